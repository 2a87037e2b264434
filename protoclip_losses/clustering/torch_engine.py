"""K-means in PyTorch operators, on the device of the features and over all ranks: rows stay where they are, sums travel.

Lloyd's algorithm, with what cannot change left out. After an update only the clusters that won or lost a row have a new
centroid. A row whose own centroid did not draw back from it can only be won by one of those; the others look at all K. At ten
rows a centroid most clusters settle within a few iterations, and K-means ends when no label changes.
"""

import numpy as np
import torch
from torch import Tensor

from .._dtypes import sum_dtype
from .assign import BLOCK_ROWS, Scores
from .points import Rows, Run, Settings, sums_by_label

ROUNDS = 16  # in which the first centroids are drawn; K-means++ draws one a round


@torch.no_grad()
def kmeans(rows: Rows, num_prototypes: int, settings: Settings) -> Run:
    """The best of ``nredo`` runs, on ``device``, where the rows are."""
    nredo = settings.nredo if settings.init is None else 1
    runs = [
        _Lloyd(rows, num_prototypes, settings.spherical).run(settings.niter, settings.tol, settings.seed, run, settings.init)
        for run in range(nredo)
    ]
    return min(runs, key=lambda run: run.objectives[-1])


def waiting_times(seed: int, run: int, number: int, total: int) -> Tensor:
    """An exponential random number for each row of all ranks: divided by weights, the smallest are a draw by weight."""
    state = np.random.SeedSequence([seed, run, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.empty(total).exponential_(generator=torch.Generator().manual_seed(int(state)))


def _settled(objectives: list[float], tol: float) -> bool:
    return len(objectives) > 1 and objectives[-2] - objectives[-1] <= tol * objectives[-2]


class _Lloyd:
    def __init__(self, rows: Rows, num_prototypes: int, spherical: bool) -> None:
        self.rows, self.num_prototypes, self.spherical = rows, num_prototypes, spherical
        points, device = rows.points, rows.points.device
        self.labels = torch.zeros(len(points), dtype=torch.int64, device=device)
        self.score = torch.full((len(points),), -torch.inf, device=device)
        self.bound = self.score.clone()  # what no centroid but a row's own scored higher than, when it was last looked at
        self.counts = torch.zeros(num_prototypes, dtype=torch.int64, device=device)
        self.centroids = torch.zeros((num_prototypes, points.shape[1]), device=device)
        # Far from the origin a score holds no digits of a distance; directions have no other origin.
        self.origin = torch.zeros(points.shape[1], device=device)
        if not spherical:
            self.origin = (self._sums(self.labels, 1)[0, :-1] / rows.total).float()
        self.square = torch.zeros(len(points), device=device)
        for part in torch.split(torch.arange(len(points), device=device), BLOCK_ROWS):
            self.square[part] = self._block(part).square().sum(1)

    def run(self, niter: int, tol: float, seed: int, run: int, init: Tensor | None) -> Run:
        self._start(seed, run, init)
        objectives: list[float] = []
        reseeded, changed = 0, self.labels
        while True:
            news = self.score.new_zeros(self.num_prototypes + 1, dtype=sum_dtype(self.score.device))
            news[changed] = 1
            news[-1] = self._distances().to(news.dtype).sum()
            news = self.rows.sum(news)
            objectives.append(float(news[-1]))
            before = self.centroids.clone()
            self._update(news[:-1].nonzero()[:, 0])
            reseeded += self._reseed(seed, run, ROUNDS + len(objectives))
            labels = self.labels.clone()
            self._reassign((self.centroids != before).any(1))
            if len(objectives) == niter or _settled(objectives, tol):
                return Run(self.centroids + self.origin, tuple(objectives), reseeded, self._certain_labels())
            differ = self.labels != labels
            changed = torch.cat([self.labels[differ], labels[differ]])

    def _certain_labels(self) -> Tensor:
        """Labels by more than any rounding of a score, else -1."""
        largest = self.square + self.centroids.square().sum(1).amax()
        return self.labels.where(self.score - self.bound > 1e-5 * largest, -1)

    def _block(self, part: Tensor) -> Tensor:
        return self.rows.points[part].float() - self.origin

    def _distances(self) -> Tensor:
        return (self.square - 2 * self.score).clamp(min=0)

    def _start(self, seed: int, run: int, init: Tensor | None) -> None:
        """The first centroids, and each row's nearest: a row drawn later is an offer to all, so the draw costs one assignment."""
        columns = torch.arange(self.num_prototypes, device=self.labels.device)
        if init is not None:
            self._move(columns, init.to(self.centroids))
            return self._offer(columns, torch.arange(len(self.labels), device=columns.device))
        drawn = torch.zeros_like(self.labels, dtype=torch.bool)
        weights = torch.ones_like(self.score)
        for number, part in enumerate(columns.tensor_split(min(ROUNDS, self.num_prototypes))):
            rows, places = self._draw(len(part), seed, run, number, weights.masked_fill(drawn, 0))
            drawn |= torch.isin(self.rows.place, places)
            self._move(part, rows)
            self._offer(part, torch.arange(len(self.labels), device=self.labels.device))
            weights = self._distances().clamp(min=1e-30)  # equal rows are drawn when no other is left
        return None

    def _draw(self, count: int, seed: int, run: int, number: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As many different rows by weight, and their places; rows of weight 0 are not drawn."""
        waits = waiting_times(seed, run, number, self.rows.total).to(weights.device)[self.rows.place]
        return self.rows.smallest(waits / weights, count)

    def _move(self, columns: Tensor, rows: Tensor) -> None:
        """Put these centroids at rows of the data."""
        centroids = rows - self.origin
        self.centroids[columns] = torch.nn.functional.normalize(centroids, dim=1) if self.spherical else centroids

    def _update(self, touched: Tensor) -> None:
        """Means of the clusters that won or lost a row."""
        number = torch.full((self.num_prototypes,), -1, device=touched.device)
        number[touched] = torch.arange(len(touched), device=touched.device)
        sums = self._sums(number[self.labels], len(touched))
        self.counts[touched] = sums[:, -1].long()
        means = (sums[:, :-1] / sums[:, -1:]).float()
        if self.spherical:
            means = torch.nn.functional.normalize(means, dim=1)
        self.centroids[touched] = means.where(sums[:, -1:] > 0, self.centroids[touched])

    def _reseed(self, seed: int, run: int, number: int) -> int:
        """Give empty clusters a row far from its centroid; how many there were rows for."""
        empty = (self.counts == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return 0
        distances = self._distances()
        apart = distances > 1e-5 * self.square  # less is rounding: there are no more distinct rows than centroids
        rows, _ = self._draw(len(empty), seed, run, number, distances.where(apart, 0))
        self._move(empty[: len(rows)], rows)
        return len(rows)

    def _sums(self, labels: Tensor, num_labels: int) -> Tensor:
        return self.rows.sum(sums_by_label(labels, self.rows.points, num_labels, self.origin))

    def _reassign(self, moved: Tensor) -> None:
        """Bring labels up to date after some centroids ``moved`` (K,)."""
        own = moved[self.labels].nonzero()[:, 0]
        half_norms = self.centroids.square().sum(1) / 2
        for part in torch.split(own, BLOCK_ROWS):
            labels = self.labels[part]
            self.score[part] = (self._block(part) * self.centroids[labels]).sum(1) - half_norms[labels]
        beaten = self.score < self.bound
        self._offer(moved.nonzero()[:, 0], (~beaten).nonzero()[:, 0])
        self.bound[beaten] = -torch.inf
        self._offer(torch.arange(self.num_prototypes, device=moved.device), beaten.nonzero()[:, 0])

    def _offer(self, columns: Tensor, rows: Tensor) -> None:
        """Let these rows go over to these centroids where that is nearer."""
        if len(columns) == 0 or len(rows) == 0:
            return
        scores = Scores(self.centroids[columns])
        for part in torch.split(rows, scores.step):
            best, winner, second = scores.best(self._block(part))
            label, score = columns[winner], self.score[part]
            nearer = best > score
            # The best of all but the row's centroid: of what is offered, and the centroid that it leaves.
            other = second.where(nearer | (label == self.labels[part]), best)
            other = torch.where(nearer & (label != self.labels[part]), torch.maximum(other, score), other)
            self.bound[part] = torch.maximum(self.bound[part], other)
            self.score[part] = best.where(nearer, score)
            self.labels[part] = label.where(nearer, self.labels[part])
