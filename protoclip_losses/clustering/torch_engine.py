"""K-means in PyTorch operators, on the device of the points and over all ranks: points stay where they are, sums travel.

Lloyd's algorithm without the work that cannot change its result. After an update only the clusters that gained or lost a point
have a new centroid. As in Hamerly's algorithm, each point has one bound, on the scores of all centroids but its own: while its
own score is above the bound, it is compared with the centroids that moved alone, and otherwise with all K. With about ten points
per centroid most clusters settle within a few iterations.

    Hamerly, "Making k-means even faster", SDM 2010: one bound for each point.
    Efraimidis, Spirakis, "Weighted random sampling with a reservoir", Inf. Process. Lett. 97 (2006): exponential keys.
    Bahmani et al., "Scalable k-means++", VLDB 2012 (k-means||): seeding in a few rounds.
"""

import numpy as np
import torch
from torch import Tensor

from .._dtypes import sum_dtype
from ..kernels.sizes import rows_per_copy
from .assign import Scores, directions, exceeds_rounding, row_lengths, squared_distances
from .origin import LARGEST_LENGTH, SMALLEST_LENGTH, robust_origin
from .points import EngineResult, KMeansConfig, ShardedPoints, segment_sums_and_counts

SEEDING_ROUNDS = 16  # k-means++ would take one round for each centroid


def kmeans(points: ShardedPoints, num_clusters: int, config: KMeansConfig) -> EngineResult:
    """The best of ``nredo`` runs on ``config.device``, where the points are."""
    origin, dtype = _frame(points, num_clusters, config.spherical)
    results = []
    for run in range(config.nredo if config.init is None else 1):
        lloyd = _Lloyd(points, num_clusters, config.spherical, origin, dtype)
        lloyd.start(config.seed, run, config.init)
        if lloyd.rounding_hides_distances():
            dtype = sum_dtype(origin.device)
            lloyd = _Lloyd(points, num_clusters, config.spherical, origin, dtype)
            lloyd.start(config.seed, run, config.init)
        results.append(lloyd.run(config.niter, config.tol, config.seed, run))
    return min(results, key=lambda result: result.objectives[-1])


def _frame(points: ShardedPoints, num_clusters: int, spherical: bool) -> tuple[Tensor, torch.dtype]:
    """The origin of scores and the dtype that holds them, the same on all ranks: float32, unless it cannot square the values."""
    own, wide = points.points, sum_dtype(points.points.device)
    sample = points.sample(num_clusters + 1)  # no more is sent than centroids are
    parts = torch.split(own, rows_per_copy(own.shape[1], own.device))
    lengths = torch.cat([row_lengths(part) for part in parts])
    lengths = lengths[lengths > 0]
    ends = torch.stack([lengths.amax(), -lengths.amin()]) if len(lengths) else lengths.new_tensor([0.0, -torch.inf])
    largest, smallest = points.ranks.maximum(ends).tolist()
    fits = largest < LARGEST_LENGTH and (-smallest > SMALLEST_LENGTH or not spherical)
    dtype = torch.float32 if fits else wide
    if spherical:
        sample = directions(sample, wide)
        sums = torch.stack([directions(part, dtype).sum(0, dtype=wide) for part in parts]).sum(0)
    else:
        one_segment = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        sums = segment_sums_and_counts(one_segment, own, 1)[0, :-1]
    # Far from the origin a score has no digits left for a distance.
    origin, spread = robust_origin(points.sum(sums) / points.total, sample)
    return origin, wide if 0 < float(spread) < SMALLEST_LENGTH else dtype


def exponential_keys(seed: int, run: int, draw: int, total: int) -> Tensor:
    """An exponential random number for each point of all ranks: divided by weights, the smallest are a weighted draw.

    Efraimidis and Spirakis (2006). The keys belong to positions, so that a draw does not depend on the number of ranks.
    """
    state = np.random.SeedSequence([seed, run, draw]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    keys = torch.empty(total, dtype=torch.float32, device="cpu")
    return keys.exponential_(generator=torch.Generator("cpu").manual_seed(int(state)))


def _has_converged(objectives: list[float], tol: float) -> bool:
    return len(objectives) > 1 and objectives[-2] - objectives[-1] <= tol * objectives[-2]


class _Lloyd:
    """One run. Scores are ``x.c - |c|^2 / 2`` about ``origin``: the nearest centroid has the highest.

    With ``spherical`` x is the direction of a point, whose nearest centroid is that of the point, however long that is.
    """

    def __init__(self, points: ShardedPoints, num_clusters: int, spherical: bool, origin: Tensor, dtype: torch.dtype) -> None:
        self.points, self.num_clusters, self.spherical = points, num_clusters, spherical
        own, device = points.points, points.points.device
        self.labels = torch.zeros(len(own), dtype=torch.int64, device=device)
        self.score = torch.full((len(own),), -torch.inf, device=device, dtype=dtype)  # of each point's own centroid
        self.bound = self.score.clone()  # no other centroid's score is above it
        self.counts = torch.zeros(num_clusters, dtype=torch.int64, device=device)
        self.centroids = torch.zeros((num_clusters, own.shape[1]), device=device, dtype=dtype)
        self.origin = origin.to(dtype)
        self.squared_norms = torch.zeros(len(own), device=device, dtype=dtype)
        self.lengths = torch.ones(len(own), device=device, dtype=sum_dtype(device))  # of the points, with spherical
        self.step = rows_per_copy(own.shape[1], device)
        for part in torch.split(torch.arange(len(own), device=device), self.step):
            self.squared_norms[part] = self._block(part).square().sum(1)
            if spherical:
                self.lengths[part] = row_lengths(own[part])

    def run(self, niter: int, tol: float, seed: int, run: int) -> EngineResult:
        objectives: list[float] = []
        reseeded, changed = 0, self.labels
        while True:
            # One collective an iteration: which clusters changed on any rank, and the objective.
            stats = self.score.new_zeros(self.num_clusters + 1, dtype=sum_dtype(self.score.device))
            stats[changed] = 1
            stats[-1] = self._point_distances().sum(dtype=stats.dtype)
            stats = self.points.sum(stats)
            objectives.append(float(stats[-1]))
            previous = self.centroids.clone()
            self._update(stats[:-1].nonzero()[:, 0])
            reseeded += self._reseed(seed, run, SEEDING_ROUNDS + len(objectives))
            labels = self.labels.clone()
            self._reassign((self.centroids != previous).any(1))
            if len(objectives) == niter or _has_converged(objectives, tol):
                centroids = (self.centroids + self.origin).float()
                return EngineResult(centroids, tuple(objectives), reseeded, self._certain_labels())
            differ = self.labels != labels
            changed = torch.cat([self.labels[differ], labels[differ]])

    def _certain_labels(self) -> Tensor:
        """Labels whose score is above the bound by more than rounding, that of the centroids which are returned too, and -1."""
        distances = self._squared_distances()
        gap, width = self.score - self.bound, self.centroids.shape[1]
        return self.labels.where(exceeds_rounding(gap, self.squared_norms, distances, width, self.origin), -1)

    def rounding_hides_distances(self) -> bool:
        """Whether scores are rounded by more than a hundredth of the objective, and another dtype is there to do better."""
        if self.score.dtype == sum_dtype(self.score.device):
            return False
        distances, squared_norms = (x.to(sum_dtype(x.device)) for x in (self._squared_distances(), self.squared_norms))
        rounding = 8 * torch.finfo(self.score.dtype).eps * (squared_norms + distances)
        stats = torch.stack([rounding.where(self._is_apart(distances), 0).sum(), distances.sum()])
        total_rounding, objective = self.points.sum(stats).tolist()
        return bool(total_rounding > 0.01 * objective)

    def _block(self, part: Tensor) -> Tensor:
        points, dtype = self.points.points[part], self.origin.dtype
        return (directions(points, dtype) if self.spherical else points.to(dtype)) - self.origin

    def _squared_distances(self) -> Tensor:
        """Squared distance of what is scored from its centroid, for each point."""
        distances = (self.squared_norms - 2 * self.score).clamp(min=0)
        # Where the two are almost equal no digit is left, and the difference of the rows is taken.
        for part in torch.split((distances < 1e-5 * self.squared_norms).nonzero()[:, 0], self.step):
            own = self.centroids[self.labels[part]]
            distances[part] = squared_distances(self._block(part), own).to(distances.dtype)
        return distances

    def _point_distances(self) -> Tensor:
        """Squared distance of each point from its centroid: with ``spherical``, |p - c|^2 = |p| |p / |p| - c|^2 + (|p| - 1)^2."""
        distances = self._squared_distances()
        return distances * self.lengths + (self.lengths - 1).square() if self.spherical else distances

    def _is_apart(self, distances: Tensor) -> Tensor:
        """Which points differ from their centroid by more than rounding."""
        return distances > 1e-13 * self.squared_norms

    def start(self, seed: int, run: int, init: Tensor | None) -> None:
        """The first centroids, and the nearest of them for each point.

        Each round compares all points with the centroids of that round alone, so that seeding costs one assignment.
        """
        columns = torch.arange(self.num_clusters, device=self.labels.device)
        everything = torch.arange(len(self.labels), device=self.labels.device)
        if init is not None:
            self._place(columns, init.to(self.centroids.device))
            return self._try_reassign(columns, everything)
        drawn = torch.zeros_like(self.labels, dtype=torch.bool)
        weights = torch.ones_like(self.lengths)
        for number, part in enumerate(columns.tensor_split(min(SEEDING_ROUNDS, self.num_clusters))):
            points, positions = self._draw(len(part), seed, run, number, weights.masked_fill(drawn, 0))
            drawn |= torch.isin(self.points.position, positions)
            self._place(part, points)
            self._try_reassign(part, everything)
            # Equal points are drawn when no other is left.
            weights = self._point_distances()
            weights = weights.clamp(min=torch.finfo(weights.dtype).tiny * 1e8)
        return None

    def _draw(self, count: int, seed: int, run: int, draw: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Up to ``count`` different points of all ranks in proportion to ``weights`` (n,), and their positions."""
        keys = exponential_keys(seed, run, draw, self.points.total).to(weights.device)[self.points.position]
        return self.points.smallest(keys / weights, count)

    def _place(self, columns: Tensor, points: Tensor) -> None:
        """Put these centroids at these points."""
        points = directions(points, sum_dtype(points.device)) if self.spherical else points
        self.centroids[columns] = points.to(self.origin.dtype) - self.origin

    def _update(self, changed: Tensor) -> None:
        """Means of the clusters that gained or lost a point; an empty one keeps its centroid."""
        segment = torch.full((self.num_clusters,), -1, device=changed.device)
        segment[changed] = torch.arange(len(changed), device=changed.device)
        sums = self._sums_and_counts(segment[self.labels], len(changed))
        self.counts[changed] = sums[:, -1].long()
        means = sums[:, :-1] / sums[:, -1:]
        means = (directions(means, means.dtype) - self.origin if self.spherical else means).to(self.centroids.dtype)
        self.centroids[changed] = means.where(sums[:, -1:] > 0, self.centroids[changed])

    def _reseed(self, seed: int, run: int, draw: int) -> int:
        """Move empty clusters to points far from their centroids; how many there were points for."""
        empty = (self.counts == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return 0
        is_apart = self._is_apart(self._squared_distances())
        points, _ = self._draw(len(empty), seed, run, draw, self._point_distances().where(is_apart, 0))
        self._place(empty[: len(points)], points)
        return len(points)

    def _sums_and_counts(self, labels: Tensor, num_segments: int) -> Tensor:
        origin = None if self.spherical else self.origin
        return self.points.sum(segment_sums_and_counts(labels, self.points.points, num_segments, origin))

    def _reassign(self, moved: Tensor) -> None:
        """Update labels, scores and bounds after the centroids ``moved`` (K,) changed."""
        own = moved[self.labels].nonzero()[:, 0]
        half_norms = self.centroids.square().sum(1) / 2
        for part in torch.split(own, self.step):
            labels = self.labels[part]
            self.score[part] = (self._block(part) * self.centroids[labels]).sum(1) - half_norms[labels]
        below = self.score < self.bound
        self._try_reassign(moved.nonzero()[:, 0], (~below).nonzero()[:, 0])
        self.bound[below] = -torch.inf
        self._try_reassign(torch.arange(self.num_clusters, device=moved.device), below.nonzero()[:, 0])

    def _try_reassign(self, columns: Tensor, rows: Tensor) -> None:
        """Reassign these points to the nearest of these centroids where it is nearer than their own."""
        if len(columns) == 0 or len(rows) == 0:
            return
        scores = Scores(self.centroids[columns])
        for part in torch.split(rows, scores.step):
            best, winner, second = scores.best(self._block(part))
            label, score = columns[winner], self.score[part]
            nearer = best > score
            # The highest score but that of the point's centroid: among the others compared, and the one that it leaves.
            other = second.where(nearer | (label == self.labels[part]), best)
            other = torch.where(nearer & (label != self.labels[part]), torch.maximum(other, score), other)
            self.bound[part] = torch.maximum(self.bound[part], other)
            self.score[part] = best.where(nearer, score)
            self.labels[part] = label.where(nearer, self.labels[part])
