"""Where distances are taken from: an origin among the rows, which a few rows far away from the others do not move."""

import torch
from torch import Tensor

from .._dtypes import sum_dtype

SAMPLED_ROWS = 255  # the median of so many is a tenth of the rows' standard deviation from that of all
SAMPLED_CENTROIDS = 31  # fewer, as it is taken for each batch
NEAR = 3.0  # median distances from the median within which a mean is among the rows
SMALLEST_LENGTH, LARGEST_LENGTH = 1e-13, 1e18  # float32 holds their squares, with room for sums


def sampled_positions(total: int, count: int = SAMPLED_ROWS) -> Tensor:
    """``count`` of the positions of ``total`` rows, or all: int64, sorted, each once, on the CPU, the same in every call."""
    if total <= count:
        return torch.arange(total, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    drawn: Tensor = torch.unique(torch.randint(total, (count,), generator=generator, device="cpu"))
    return drawn


def robust_origin(mean: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) of rows, or the median of a sample of them (S, D) where the mean is farther away than the rows are.

    One row of 1e6 among a thousand of length 1 puts their mean at 1e3: about it, squares of float32 hold no digit of a distance.

    Returns:
        The origin, in float32, and the median over the sample of the distance from its median, a 0-d tensor.
    """
    wide, middle = sum_dtype(sample.device), (len(sample) - 1) // 2
    median = sample.sort(0).values[middle]  # not Tensor.median, which has no deterministic form on CUDA
    lengths = torch.linalg.vector_norm(torch.cat([sample, mean[None].to(sample.dtype)]) - median, dim=1, dtype=wide)
    spread = lengths[:-1].sort().values[middle]
    return mean.where(lengths[-1] <= NEAR * spread, median).float(), spread


def centroid_origin(centroids: Tensor) -> Tensor:
    """:func:`robust_origin` of centroids (K, D)."""
    return robust_origin(centroids.mean(0), centroids[:: -(-len(centroids) // SAMPLED_CENTROIDS)])[0]
