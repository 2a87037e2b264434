"""The nearest centroids of each row in blocks of rows: the final assignment of every engine, and of new rows."""

import math

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from ..kernels.blocks import rows_per_block
from .origin import DRAWN_CENTROIDS, robust_origin, spaced

BLOCK_ROWS = 2**14  # rows that are copied to float32 at a time
GROUPS = 64  # a maximum of values is ten times faster than one with its position; it narrows the search to one group
CANDIDATES = 8  # centroids whose distances are computed again where rounding may decide
EXACT_VALUES = 2**22  # distances that are computed again at a time


@torch.no_grad()
def assign(points: Tensor, centroids: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Nearest centroid of each row in Euclidean distance.

    .. math::
        a_i = \arg\min_k \|x_i - c_k\|^2 = \arg\max_k \left( x_i \cdot c_k - \tfrac{1}{2} \|c_k\|^2 \right)

    Where rounding of the right-hand side could decide, the distances themselves are compared.

    Args:
        points: (N, D).
        centroids: (K, D).
        known: (N,) int64, labels that are certain, and -1 where the nearest centroid is to be found.

    Returns:
        Labels (N,) int64, the lowest id among equals, and squared distances (N,).
    """
    nearest_to = Nearest(centroids, points.device)
    labels = torch.full((len(points),), -1, device=points.device) if known is None else known.clone()
    for part in torch.split((labels < 0).nonzero()[:, 0], nearest_to.step):
        labels[part] = nearest_to.one(points[part])
    # From the difference itself: expanding the square loses all digits of a small distance.
    distances = [
        (points[start : start + BLOCK_ROWS].float() - nearest_to.centroids[labels[start : start + BLOCK_ROWS]]).square().sum(1)
        for start in range(0, max(1, len(points)), BLOCK_ROWS)
    ]
    return labels, torch.cat(distances)


@torch.no_grad()
def nearest(points: Tensor, centroids: Tensor, num_labels: int) -> Tensor:
    """The ``num_labels`` nearest centroids of each row, nearest first: (N, num_labels) int64; the lowest id among equals."""
    nearest_to = Nearest(centroids, points.device)
    labels = torch.empty((len(points), num_labels), dtype=torch.int64, device=points.device)
    for start in range(0, len(points), nearest_to.step):
        rows = slice(start, start + nearest_to.step)
        labels[rows] = nearest_to.several(points[rows], num_labels)
    return labels


class Nearest:
    """The nearest of some centroids (K, D), for blocks of at most ``step`` rows on the same device."""

    def __init__(self, centroids: Tensor, device: torch.device) -> None:
        self.centroids = centroids.to(device=device, dtype=torch.float32)
        # About a point among them: far from it, half the squared norms would hold no other digits.
        self.origin = robust_origin(self.centroids.mean(0), self.centroids[spaced(len(centroids), device, DRAWN_CENTROIDS)])
        centered = self.centroids - self.origin
        # Squares of very small numbers are zero; a power of two rounds nothing.
        largest = float(centered.abs().max()) if centered.numel() and device.type == "cpu" else 1.0
        self.factor = 2.0 ** -math.frexp(largest)[1] if 0 < largest < 1e-12 else 1.0
        self.scores = Scores(centered * self.factor if self.factor != 1 else centered)
        self.step = self.scores.step
        # Products of D terms are exact to about sqrt(D) roundings.
        self.relative_error = (8 + math.sqrt(centroids.shape[1])) * torch.finfo(torch.float32).eps

    def one(self, points: Tensor) -> Tensor:
        """Labels (b,)."""
        block = self._centered(points)
        best, labels, second = self.scores.best(block)
        doubtful = (best - second <= self._error(block, best)).nonzero()[:, 0]
        if len(doubtful) and len(self.centroids) > 1:
            labels[doubtful] = self.several(points[doubtful], 1)[:, 0]
        return labels

    def several(self, points: Tensor, count: int) -> Tensor:
        """Labels (b, count), nearest first, by the distances to the candidates with the highest scores."""
        num = len(self.centroids)
        block = self._centered(points)
        candidates, last = self.scores.nearest(block, min(num, count + CANDIDATES))
        candidates = candidates.sort(1).values  # the lowest id first among equals
        squares = (self._exact(points)[:, None] - self._exact(self.centroids)[candidates]).square().sum(2)
        squares, order = squares.sort(dim=1, stable=True)
        labels = candidates.gather(1, order[:, :count])
        if candidates.shape[1] < num:
            # A centroid that is no candidate has no higher score than the last candidate.
            norms = block.square().sum(1)
            error = self._error(block, last)
            wanted = squares[:, count - 1].to(norms.dtype) * self.factor**2
            doubtful = (norms - 2 * last - wanted <= 2 * error).nonzero()[:, 0]
            for part in torch.split(doubtful, max(1, EXACT_VALUES // num)):
                labels[part] = self._by_all_distances(points[part], count)
        return labels

    def _by_all_distances(self, points: Tensor, count: int) -> Tensor:
        """Labels (b, count) from the distances to all centroids."""
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(self._exact(points), self._exact(self.centroids), compute_mode=mode)
        order: Tensor = distances.sort(dim=1, stable=True).indices
        return order[:, :count]

    def _centered(self, points: Tensor) -> Tensor:
        block = points.float() - self.origin
        return block * self.factor if self.factor != 1 else block

    def _error(self, block: Tensor, score: Tensor) -> Tensor:
        """How far rounding may put scores near this one wrong: those centroids are about as long as the row and its distance."""
        norms = block.square().sum(1)
        return self.relative_error * 2 * (norms + (norms - 2 * score).clamp(min=0))

    def _exact(self, x: Tensor) -> Tensor:
        return x.to(sum_dtype(x.device))


class Scores:
    r"""Scores :math:`x \cdot c_k - \tfrac{1}{2} \|c_k\|^2` of blocks of at most ``step`` rows, in one buffer."""

    def __init__(self, centroids: Tensor) -> None:
        count = len(centroids)
        self.group_size = -(-count // GROUPS)
        # Centroids of a group have successive ids and lie one column of each group apart: a maximum then runs along rows.
        # A multiple of 64 columns, because products round the last few otherwise, and equal centroids would differ.
        ids = torch.arange(GROUPS * self.group_size, device=centroids.device).view(GROUPS, self.group_size).T.flatten()
        self.columns = centroids[ids.clamp(max=count - 1)].T
        self.half_norms = (self.columns.square().sum(0) / 2).masked_fill(ids >= count, torch.inf)
        self.step = rows_per_block(len(self.half_norms), torch.float32, None)
        self.buffer = centroids.new_empty((self.step, len(self.half_norms)))

    def best(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's highest score, its centroid (the lowest id among equals), and the highest score of the others."""
        groups, highest = self._grouped(block)
        value, group, position = self._next_best(groups, highest)
        return value, group * self.group_size + position, highest.amax(1)

    def nearest(self, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The centroids with each row's ``count`` highest scores (b, count), the lowest id first among equals; the last score."""
        groups, highest = self._grouped(block)
        ids = torch.empty((len(block), count), dtype=torch.int64, device=block.device)
        rows = torch.arange(len(block), device=block.device)
        for column in ids.T:
            value, group, position = self._next_best(groups, highest)
            groups[rows, position, group] = -torch.inf
            column.copy_(group * self.group_size + position)
        return ids, value

    def _grouped(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (b, group size, groups), and the highest of each group (b, groups)."""
        scores = torch.addmm(self.half_norms, block, self.columns, beta=-1, out=self.buffer[: len(block)])
        groups = scores.view(len(block), self.group_size, GROUPS)
        return groups, groups.amax(1)

    def _next_best(self, groups: Tensor, highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's highest score, its group and its position there; ``highest`` is then that of the other scores."""
        value, group = highest.max(1)  # the first among equals, as argmax below
        members = groups[torch.arange(len(groups), device=groups.device), :, group]
        position = members.argmax(1)
        others = members.scatter_(1, position[:, None], -torch.inf).amax(1)
        highest.scatter_(1, group[:, None], others[:, None])
        return value, group, position
