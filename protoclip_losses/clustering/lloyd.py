"""One run of K-means in PyTorch operators: points stay where they are, in memory or not, sums travel between ranks.

Lloyd's algorithm without the work that cannot change its result. After an update only the clusters that gained or lost a point
have a new centroid. As in Hamerly's algorithm, each point has one bound, on the scores of all centroids but its own: while its
own score is above the bound, it is compared with the centroids that moved alone, and otherwise with all K. With about ten points
per centroid most clusters settle within a few iterations.

    Hamerly, "Making k-means even faster", SDM 2010: one bound for each point.
    Bahmani et al., "Scalable k-means++", VLDB 2012 (k-means||): seeding in a few rounds.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from .assign import Scores, directions, exceeds_rounding, row_lengths, squared_distances
from .draws import exponential_keys
from .points import EngineResult, ShardedPoints, segment_sums_and_counts
from .row_source import chosen_rows, stripes

SEEDING_ROUNDS = 16  # k-means++ would take one round for each centroid
STATE = ("labels", "score", "bound", "is_empty", "changed", "centroids")


class Lloyd:
    """One run. Scores are ``x.c - |c|^2 / 2`` about ``origin``: the nearest centroid has the highest.

    With ``spherical`` x is the direction of a point, whose nearest centroid is that of the point, however long that is.
    """

    def __init__(self, points: ShardedPoints, num_clusters: int, spherical: bool, origin: Tensor, dtype: torch.dtype) -> None:
        self.points, self.num_clusters, self.spherical = points, num_clusters, spherical
        count, device = len(points.points), points.device
        self.labels = torch.zeros(count, dtype=torch.int32, device=device)
        self.score = torch.full((count,), -torch.inf, device=device, dtype=dtype)  # of each point's own centroid
        self.bound = self.score.clone()  # no other centroid's score is above it
        self.is_empty = torch.ones(num_clusters, dtype=torch.bool, device=device)
        self.changed = torch.zeros(num_clusters, dtype=torch.bool, device=device)  # clusters that gained or lost a point here
        self.centroids = torch.zeros((num_clusters, points.points.shape[1]), device=device, dtype=dtype)
        self.origin = origin.to(dtype)
        self.squared_norms = torch.zeros(count, device=device, dtype=dtype)
        self.lengths = torch.ones(count if spherical else 0, device=device, dtype=sum_dtype(device))  # of the points
        self.objectives: list[float] = []
        self.reseeded = 0
        for part, block in points.blocks():
            self.squared_norms[part] = self._scored(block).square().sum(1)
            if spherical:
                self.lengths[part] = row_lengths(block)

    def iterations(self, niter: int, tol: float, seed: int, run: int) -> Iterator[None]:
        """Run to the end from where the state is; yields after each iteration, and before the first."""
        if not self.objectives:
            yield
        while not self._has_ended(niter, tol):
            # One collective an iteration: which clusters changed on any rank, and the objective.
            stats = self.score.new_zeros(self.num_clusters + 1, dtype=sum_dtype(self.score.device))
            stats[:-1] = self.changed
            stats[-1] = self._objective()
            stats = self.points.sum(stats)
            self.objectives.append(float(stats[-1]))
            previous = self.centroids.clone()
            self._update(stats[:-1].nonzero()[:, 0])
            self.reseeded += self._reseed(seed, run, SEEDING_ROUNDS + len(self.objectives))
            self.changed.zero_()
            self._reassign((self.centroids != previous).any(1))
            yield

    def _has_ended(self, niter: int, tol: float) -> bool:
        objectives = self.objectives
        has_converged = len(objectives) > 1 and objectives[-2] - objectives[-1] <= tol * objectives[-2]
        return len(objectives) == niter or has_converged

    def result(self) -> EngineResult:
        """Of the run as far as it went."""
        centroids = (self.centroids + self.origin).float()
        return EngineResult(centroids, tuple(self.objectives), self.reseeded, self._certain_labels())

    def state(self) -> dict[str, Tensor]:
        """All that the next iterations depend on; what can be computed from the points alone is left out."""
        tensors = {name: getattr(self, name) for name in STATE}
        numbers = torch.tensor([*self.objectives, float(self.reseeded)], dtype=torch.float64, device="cpu")
        return {**tensors, "objectives_and_reseeded": numbers}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state` of the same points."""
        for name in STATE:
            getattr(self, name).copy_(state[name])
        *self.objectives, reseeded = state["objectives_and_reseeded"].tolist()
        self.reseeded = int(reseeded)

    def _certain_labels(self) -> Tensor:
        """Labels whose score is above the bound by more than rounding, that of the centroids which are returned too, and -1."""
        labels, distances, width = self.labels.clone(), self._squared_distances(), self.centroids.shape[1]
        for part in stripes(len(labels)):
            gap = self.score[part] - self.bound[part]
            labels[part][~exceeds_rounding(gap, self.squared_norms[part], distances[part], width, self.origin)] = -1
        return labels

    def rounding_hides_distances(self) -> bool:
        """Whether scores are rounded by more than a hundredth of the objective, and another dtype is there to do better."""
        if self.score.dtype == sum_dtype(self.score.device):
            return False
        distances = self._squared_distances()
        stats = torch.zeros(2, dtype=sum_dtype(distances.device), device=distances.device)
        for part in stripes(len(distances)):
            own, squared_norms = (x[part].to(stats.dtype) for x in (distances, self.squared_norms))
            rounding = 8 * torch.finfo(self.score.dtype).eps * (squared_norms + own)
            stats += torch.stack([rounding.where(self._is_apart(own, squared_norms), 0).sum(), own.sum()])
        total_rounding, objective = self.points.sum(stats).tolist()
        return bool(total_rounding > 0.01 * objective)

    def _scored(self, block: Tensor) -> Tensor:
        """What is scored of a block of points: their differences from the origin, or those of their directions."""
        return (directions(block, self.origin.dtype) if self.spherical else block.to(self.origin.dtype)) - self.origin

    def _squared_distances(self) -> Tensor:
        """Squared distance of what is scored from its centroid, for each point."""
        distances = torch.empty_like(self.score)
        is_small = torch.empty(len(distances), dtype=torch.bool, device=distances.device)
        for part in stripes(len(distances)):
            distances[part] = (self.squared_norms[part] - 2 * self.score[part]).clamp(min=0)
            is_small[part] = distances[part] < 1e-5 * self.squared_norms[part]
        # Where the two are almost equal no digit is left, and the difference of the rows is taken.
        for rows, block in self.points.blocks(chosen_rows(is_small)):
            own = self.centroids[self.labels[rows]]
            distances[rows] = squared_distances(self._scored(block), own).to(distances.dtype)
        return distances

    def _point_distances(self, distances: Tensor | None = None) -> Tensor:
        """Squared distance of each point from its centroid: with ``spherical``, |p - c|^2 = |p| |p / |p| - c|^2 + (|p| - 1)^2.

        From ``distances`` (n,) of what is scored, if they are known.
        """
        distances = self._squared_distances() if distances is None else distances
        return distances * self.lengths + (self.lengths - 1).square() if self.spherical else distances

    def _objective(self) -> Tensor:
        """Of this rank's points, a 0-d tensor."""
        distances = self._point_distances()
        total = torch.zeros((), dtype=sum_dtype(distances.device), device=distances.device)
        for part in stripes(len(distances)):
            total += self.points.weighted(distances[part], part).sum(dtype=total.dtype)
        return total

    def _is_apart(self, distances: Tensor, squared_norms: Tensor) -> Tensor:
        """Which points differ from their centroid by more than rounding."""
        return distances > 1e-13 * squared_norms

    def start(self, seed: int, run: int, init: Tensor | None) -> None:
        """The first centroids, and the nearest of them for each point.

        Each round compares all points with the centroids of that round alone, so that seeding costs one assignment.
        """
        columns = torch.arange(self.num_clusters, device=self.labels.device)
        everything = torch.ones_like(self.labels, dtype=torch.bool)
        if init is not None:
            self._place(columns, init.to(self.centroids.device))
            self._try_reassign(columns, everything)
        else:
            self._seed(columns, everything, seed, run)
        self.changed[self.labels] = True

    def _seed(self, columns: Tensor, everything: Tensor, seed: int, run: int) -> None:
        """Draw these centroids in rounds, each in proportion to the squared distance from those before."""
        drawn = torch.zeros_like(everything)
        weights = torch.ones_like(self.score)
        for number, part in enumerate(columns.tensor_split(min(SEEDING_ROUNDS, len(columns)))):
            points, positions = self._draw(len(part), seed, run, number, weights, drawn)
            drawn[self.points.held(positions)] = True
            self._place(part, points)
            self._try_reassign(part, everything)
            # Equal points are drawn when no other is left.
            weights = self._point_distances()
            weights.clamp_(min=torch.finfo(weights.dtype).tiny * 1e8)

    def _draw(
        self, count: int, seed: int, run: int, draw: int, weights: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Up to ``count`` points of all ranks in proportion to ``weights`` (n,), each once, and their positions.

        Points of weight 0, and those of the mask ``excluded`` (n,), are not drawn.
        """
        keys = self.points.own(exponential_keys(seed, run, draw, self.points.total).to(weights))
        for part in stripes(len(keys)):
            keys[part] /= self.points.weighted(weights[part], part)
        if excluded is not None:
            keys.masked_fill_(excluded, torch.inf)
        return self.points.smallest(keys, count)

    def _place(self, columns: Tensor, points: Tensor) -> None:
        """Put these centroids at these points."""
        points = directions(points, sum_dtype(points.device)) if self.spherical else points
        self.centroids[columns] = points.to(self.origin.dtype) - self.origin

    def _update(self, changed: Tensor) -> None:
        """Means of the clusters that gained or lost a point; an empty one keeps its centroid."""
        segment = torch.full((self.num_clusters,), -1, device=changed.device, dtype=torch.int32)
        segment[changed] = torch.arange(len(changed), device=changed.device, dtype=torch.int32)
        origin = None if self.spherical else self.origin
        points, weights = self.points.points, self.points.weights
        sums = self.points.sum(segment_sums_and_counts(segment[self.labels], points, len(changed), origin, weights))
        self.is_empty[changed] = sums[:, -1] == 0
        means = sums[:, :-1] / sums[:, -1:]
        means = (directions(means, means.dtype) - self.origin if self.spherical else means).to(self.centroids.dtype)
        self.centroids[changed] = means.where(sums[:, -1:] > 0, self.centroids[changed])

    def _reseed(self, seed: int, run: int, draw: int) -> int:
        """Move empty clusters to points far from their centroids; how many there were points for."""
        empty = self.is_empty.nonzero()[:, 0]
        if len(empty) == 0:
            return 0
        is_equal = torch.empty(len(self.labels), dtype=torch.bool, device=self.labels.device)
        distances = self._squared_distances()
        for part in stripes(len(distances)):
            is_equal[part] = ~self._is_apart(distances[part], self.squared_norms[part])
        points, _ = self._draw(len(empty), seed, run, draw, self._point_distances(distances), is_equal)
        self._place(empty[: len(points)], points)
        return len(points)

    def _reassign(self, moved: Tensor) -> None:
        """Update labels, scores and bounds after the centroids ``moved`` (K,) changed."""
        half_norms = self.centroids.square().sum(1) / 2
        for part, block in self.points.blocks(chosen_rows(moved[self.labels])):
            labels = self.labels[part]
            self.score[part] = (self._scored(block) * self.centroids[labels]).sum(1) - half_norms[labels]
        below = self.score < self.bound
        self._try_reassign(moved.nonzero()[:, 0], ~below)
        self.bound[below] = -torch.inf
        self._try_reassign(torch.arange(self.num_clusters, device=moved.device), below)

    def _try_reassign(self, columns: Tensor, rows: Tensor) -> None:
        """Reassign the points of this mask (n,) to the nearest of these centroids where it is nearer than their own."""
        if len(columns) == 0 or len(rows) == 0:
            return
        scores = Scores(self.centroids[columns])
        for part, block in self.points.blocks(chosen_rows(rows), scores.step):
            best, winner, second = scores.best(self._scored(block))
            label, score, own = columns[winner].int(), self.score[part], self.labels[part]
            nearer, differs = best > score, label != own
            # The highest score but that of the point's centroid: among the others compared, and the one that it leaves.
            other = second.where(nearer | ~differs, best)
            other = torch.where(nearer & differs, torch.maximum(other, score), other)
            self.bound[part] = torch.maximum(self.bound[part], other)
            self.score[part] = best.where(nearer, score)
            self.labels[part] = new = label.where(nearer, own)
            moved = new != own
            self.changed[torch.cat([own[moved], new[moved]])] = True
