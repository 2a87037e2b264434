"""The nearest centroids of each row in blocks of rows: the final assignment of every engine, and of new rows."""

import torch
from torch import Tensor

from ..kernels.blocks import rows_per_block

BLOCK_ROWS = 2**14  # rows that are copied to float32 at a time
GROUPS = 64  # a maximum of values is ten times faster than one with its position; it narrows the search to one group


@torch.no_grad()
def assign(points: Tensor, centroids: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Nearest centroid of each row in Euclidean distance.

    .. math::
        a_i = \arg\min_k \|x_i - c_k\|^2 = \arg\max_k \left( x_i \cdot c_k - \tfrac{1}{2} \|c_k\|^2 \right)

    Args:
        points: (N, D).
        centroids: (K, D).
        known: (N,) int64, labels that are certain, and -1 where the nearest centroid is to be found.

    Returns:
        Labels (N,) int64, the lowest id among equals, and squared distances (N,).
    """
    centroids, origin = _centered(centroids, points.device)
    scores = Scores(centroids)
    labels = torch.full((len(points),), -1, device=points.device) if known is None else known.clone()
    for part in torch.split((labels < 0).nonzero()[:, 0], scores.step):
        labels[part] = scores.best(points[part].float() - origin)[1]
    # From the difference itself: expanding the square loses all digits of a small distance.
    distances = [
        (points[start : start + BLOCK_ROWS].float() - origin - centroids[labels[start : start + BLOCK_ROWS]]).square().sum(1)
        for start in range(0, max(1, len(points)), BLOCK_ROWS)
    ]
    return labels, torch.cat(distances)


@torch.no_grad()
def nearest(points: Tensor, centroids: Tensor, num_labels: int) -> Tensor:
    """The ``num_labels`` nearest centroids of each row, nearest first: (N, num_labels) int64; the lowest id among equals."""
    centroids, origin = _centered(centroids, points.device)
    scores = Scores(centroids)
    labels = torch.empty((len(points), num_labels), dtype=torch.int64, device=points.device)
    for start in range(0, len(points), scores.step):
        rows = slice(start, start + scores.step)
        labels[rows] = scores.nearest(points[rows].float() - origin, num_labels)
    return labels


def _centered(centroids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centroids about their mean, and the mean: far from the origin, half the squared norms would hold no other digits."""
    centroids = centroids.to(device=device, dtype=torch.float32)
    origin = centroids.mean(0)
    return centroids - origin, origin


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

    def nearest(self, block: Tensor, count: int) -> Tensor:
        """Each row's ``count`` nearest centroids, nearest first: (b, count); the lowest id among equals."""
        groups, highest = self._grouped(block)
        ids = torch.empty((len(block), count), dtype=torch.int64, device=block.device)
        rows = torch.arange(len(block), device=block.device)
        for column in ids.T:
            _, group, position = self._next_best(groups, highest)
            groups[rows, position, group] = -torch.inf
            column.copy_(group * self.group_size + position)
        return ids

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
