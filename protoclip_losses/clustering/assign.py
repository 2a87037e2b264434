"""The nearest centroid of each row, ties to the lowest id: the final assignment, one for all engines, and its blocks."""

import torch
from torch import Tensor

from ..kernels.blocks import rows_per_block

BLOCK_ROWS = 2**14  # rows that are copied to float32 at a time
GROUPS = 64  # a maximum of values is ten times faster than one that remembers where; it narrows the search to one group


@torch.no_grad()
def assign(features: Tensor, centroids: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Nearest centroid of each row in Euclidean distance.

    .. math::
        a_i = \arg\min_k \|x_i - c_k\|^2 = \arg\max_k \left( x_i \cdot c_k - \tfrac{1}{2} \|c_k\|^2 \right)

    Args:
        features: (N, D).
        centroids: (K, D).
        known: (N,) int64, labels that are beyond doubt, and -1 where the nearest centroid is to be found.

    Returns:
        Labels (N,) int64, the lowest id among equals, and squared distances (N,).
    """
    centroids = centroids.to(device=features.device, dtype=torch.float32)
    origin = centroids.mean(0)  # distances from a point among them: far from 0, the half norms would hold no other digits
    centroids = centroids - origin
    scores = Scores(centroids)
    labels = torch.full((len(features),), -1, device=features.device) if known is None else known.clone()
    for part in torch.split((labels < 0).nonzero()[:, 0], scores.step):
        labels[part] = scores.best(features[part].float() - origin)[1]
    # From the difference itself: expanding the square loses all digits of a small distance.
    distances = [
        (features[start : start + BLOCK_ROWS].float() - origin - centroids[labels[start : start + BLOCK_ROWS]]).square().sum(1)
        for start in range(0, max(1, len(features)), BLOCK_ROWS)
    ]
    return labels, torch.cat(distances)


class Scores:
    r"""Scores :math:`x \cdot c_k - \tfrac{1}{2} \|c_k\|^2` of blocks of at most ``step`` rows, in one buffer."""

    def __init__(self, centroids: Tensor) -> None:
        count = len(centroids)
        self.inside = -(-count // GROUPS)
        # Centroids of a group have successive numbers and lie one column of each group apart: a maximum then runs along rows.
        # A multiple of 64 columns, because products round the last few otherwise, and equal centroids would differ.
        number = torch.arange(GROUPS * self.inside, device=centroids.device).view(GROUPS, self.inside).T.flatten()
        self.columns = centroids[number.clamp(max=count - 1)].T
        self.half_norms = (self.columns.square().sum(0) / 2).masked_fill(number >= count, torch.inf)
        self.step = rows_per_block(len(self.half_norms), torch.float32, None)
        self.buffer = centroids.new_empty((self.step, len(self.half_norms)))

    def best(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's highest score, its column (the lowest among equals), and the highest score of the other columns."""
        scores = torch.addmm(self.half_norms, block, self.columns, beta=-1, out=self.buffer[: len(block)])
        groups = scores.view(len(block), self.inside, GROUPS)
        highest = groups.amax(1)
        value, group = highest.max(1)
        inside = groups[torch.arange(len(block), device=block.device), :, group]
        place = inside.argmax(1)
        others = inside.scatter_(1, place[:, None], -torch.inf).amax(1)
        second = highest.scatter_(1, group[:, None], others[:, None]).amax(1)
        return value, group * self.inside + place, second
