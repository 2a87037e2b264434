"""The point that distances are computed about: far from it, their expanded squares have no digits left."""

import torch
from torch import Tensor

DRAWN, DRAWN_CENTROIDS = 257, 65  # rows whose median is looked at
NEAR = 4.0  # how many median distances from that median the mean may lie


def spaced(total: int, device: torch.device, count: int = DRAWN) -> Tensor:
    """Up to ``count`` positions, evenly spaced among ``total``."""
    count = min(total, count)
    return torch.arange(count, device=device) * max(0, total - 1) // max(1, count - 1)


def robust_origin(mean: Tensor, drawn: Tensor) -> Tensor:
    """The mean (D,) of rows, or their median where a few far ones have dragged the mean away from the others.

    Args:
        mean: of all rows.
        drawn: (n, D), some of them.
    """
    if len(drawn) == 0:
        return mean
    median = drawn.median(0).values
    spread = torch.linalg.vector_norm(drawn - median, dim=1).median()
    is_near = torch.linalg.vector_norm(mean - median) <= NEAR * spread
    return torch.where(is_near & mean.isfinite().all(), mean, median)
