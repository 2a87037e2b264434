"""Clusters of bounded size: an auction assigns the rows, then centroids become the means of their members, and so on.

The assignment with the smallest sum of squared distances under a bound on the size of clusters is a transportation problem. In
an auction for it each cluster has a price. A row bids for the cluster with the highest value, which is its score less the price:
it offers so much that the second best would be as good, and epsilon more. A cluster keeps its highest bids, as many as it may
have rows, and the lowest that it keeps becomes its price; the other rows bid again. Prices never fall, and at the end the sum of
squared distances is within N epsilon of the smallest one.

    Bertsekas, Castanon, "The auction algorithm for the transportation problem", Annals of Operations Research 20 (1989).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from ..distributed import RankRows, gather_sizes
from .assign import Scores, directions
from .labels import assign_points
from .origin import centroid_origin
from .points import KMeansConfig, ShardedPoints, segment_sums_and_counts
from .row_source import chosen_rows

# Epsilon as a share of the mean squared distance from the nearest centroid: coarse while centroids still move, then fine.
EPSILONS = (1.0, 0.1)
SMALLEST_EPSILON = 1e-6  # as a share of the squared distance of a typical centroid from the others
ROUNDING = 1e-6  # a share of the objective that says nothing
LEVELS = 2**20  # of a bid, for each epsilon: rounding must not break the ties between equal rows


@dataclass(frozen=True)
class Assignment:
    """Centroids and the points that are assigned to them.

    Attributes:
        centroids: (K, D) float32.
        labels: (n,) int64 of this rank's points.
        objective: sum of squared distances, over all ranks.
        not_nearest: points of all ranks to which another centroid is nearer.
    """

    centroids: Tensor
    labels: Tensor
    objective: float
    not_nearest: int = 0


def bound_sizes(points: ShardedPoints, clusters: Assignment, max_size: int, config: KMeansConfig) -> Assignment:
    """Clusters of at most ``max_size`` points, from those where each point has the nearest centroid.

    For each epsilon assignment and means alternate, until the objective falls by no more than ``tol``, or ``niter`` times.
    """
    centroids, spherical = clusters.centroids.to(points.device), config.spherical
    if not bool((_sizes(points, clusters.labels, len(centroids)) > max_size).any()):
        return clusters
    labels = nearest = clusters.labels
    unbounded, lowest = clusters.objective, math.inf
    for share in EPSILONS:
        for _ in range(config.niter):
            found = Auction(points, centroids, nearest, max_size, share * unbounded / points.total).run()
            means = _means(points, centroids, found, spherical)
            objective, previous = _assigned(points, means, found, spherical)[1], lowest
            if objective < (1 - ROUNDING) * previous:
                centroids, labels, lowest = means, found, objective
                nearest, unbounded = _assigned(points, centroids, None, spherical)
            if not objective < (1 - config.tol) * previous:
                break
    return Assignment(centroids, labels, lowest, int(points.sum((nearest != labels).sum())))


def _sizes(points: ShardedPoints, labels: Tensor, num_clusters: int) -> Tensor:
    """Members of each cluster (K,) over all ranks."""
    return points.sum(torch.bincount(labels, minlength=num_clusters))


def _assigned(points: ShardedPoints, centroids: Tensor, known: Tensor | None, spherical: bool) -> tuple[Tensor, float]:
    """Labels of this rank's points, and the objective over all ranks."""
    labels, objective = assign_points(points, centroids, known, spherical)
    return labels, float(points.sum(objective))


def _means(points: ShardedPoints, centroids: Tensor, labels: Tensor, spherical: bool) -> Tensor:
    """Means of the members (K, D); an empty cluster keeps its centroid."""
    origin = None if spherical else centroid_origin(centroids).to(sum_dtype(centroids.device))
    sums = points.sum(segment_sums_and_counts(labels, points.points, len(centroids), origin))
    means = sums[:, :-1] / sums[:, -1:]
    means = directions(means, means.dtype) if origin is None else means + origin
    return means.to(centroids.dtype).where(sums[:, -1:] > 0, centroids)


class Auction:
    """Labels with the smallest sum of squared distances, up to N ``epsilon``, where no cluster has more than ``max_size`` points.

    Points whose nearest clusters (``labels``) are not overfull never bid. Equal bids go to the lowest position among the points
    of all ranks. Scores are in float64, where the order of additions hardly matters: ranks and blocks change no label.

    Where many points compete for few clusters and the next ones are far away, a price takes many rounds to get there: after
    1,000 + N / 2 rounds epsilon begins to double, every eighth of so many, so that it ends for any points.
    """

    def __init__(self, points: ShardedPoints, centroids: Tensor, labels: Tensor, max_size: int, epsilon: float) -> None:
        self.points, self.max_size, self.num_clusters = points, max_size, len(centroids)
        wide = sum_dtype(points.device)
        self.origin = centroid_origin(centroids).to(wide)
        centered = centroids.to(wide) - self.origin
        self.scores = Scores(centered)  # half of the squared distances that they stand for: so are prices and bids
        norms = centered.square().sum(1)
        typical = norms[norms > 0].sort().values
        smallest = SMALLEST_EPSILON * float(typical[len(typical) // 2]) if len(typical) else 1.0
        # A power of two, which the rounding of the objective does not move: epsilon decides between points and clusters.
        self.epsilon = 2.0 ** math.floor(math.log2(max(epsilon, smallest) / 2))
        self.level = self.epsilon / LEVELS
        self.labels = labels.clone()
        self.bids = torch.zeros(len(labels), dtype=wide, device=points.device)
        self.prices = torch.zeros(self.num_clusters, dtype=wide, device=points.device)
        self.was_overfull = torch.zeros(self.num_clusters, dtype=torch.bool, device=points.device)

    def run(self) -> Tensor:
        """The labels (n,) of this rank's points."""
        rounds, patience = 0, 1000 + self.points.total // 2
        while bool((overfull := _sizes(self.points, self.labels, self.num_clusters) > self.max_size).any()):
            if bool((first := overfull & ~self.was_overfull).any()):
                self.labels[first[self.labels]] = -1  # they are there without a bid
                self.was_overfull |= first
            else:
                self._keep_highest_bids(overfull)
            self._bid(self.epsilon * 2 ** max(0, 8 * rounds // patience - 7))
            rounds += 1
        return self.labels

    def _bid(self, epsilon: float) -> None:
        """Points without a cluster bid for the one with the highest value."""
        self.scores.set_prices(self.prices)
        for part, block in self.points.blocks(chosen_rows(self.labels < 0), self.scores.step):
            best, winner, second = self.scores.best(block.to(self.origin.dtype) - self.origin)
            gap = ((best - second) / self.level).round() * self.level
            self.labels[part], self.bids[part] = winner, self.prices[winner] + gap + epsilon

    def _keep_highest_bids(self, overfull: Tensor) -> None:
        """In these clusters (K,): raise their prices to the lowest bid that is kept; the other points have no cluster then."""
        parts = list(chosen_rows(overfull[self.labels]))
        members = torch.cat(parts) if parts else self.labels[:0]
        ranks = RankRows(self.points.ranks.group, gather_sizes(len(members), self.points.ranks.group))
        own = self.labels[members], self.bids[members], self.points.positions_of(members)
        labels, bids, positions = ranks.gather_each(*own)
        order = positions.argsort()
        order = order[bids[order].argsort(descending=True, stable=True)]
        order = order[labels[order].argsort(stable=True)]
        ordered = labels[order]
        counts = torch.bincount(ordered, minlength=self.num_clusters)
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[ordered]
        lowest = place == self.max_size - 1
        self.prices[ordered[lowest]] = bids[order[lowest]]
        is_kept = torch.empty_like(lowest)
        is_kept[order] = place < self.max_size
        self.labels[members[~is_kept[ranks.own]]] = -1
