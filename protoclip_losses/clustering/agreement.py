"""How far two clusterings of the same samples agree beyond chance, at any number of clusters."""

import torch
from torch import Tensor


def adjusted_agreement(first: Tensor, second: Tensor) -> tuple[float, float]:
    r"""Adjusted Rand index and adjusted mutual information of two labelings: 1 if they are the same, about 0 if unrelated.

    .. math::
        \frac{\text{index} - \mathbb{E}[\text{index}]}{\max \text{index} - \mathbb{E}[\text{index}]}

    The expectation is over random labelings with the same cluster sizes, the maximum the mean of both labelings' own values.
    Cost grows with the samples and with the square of the number of *different* cluster sizes, not with K x K.

    Args:
        first: (N,) int64; samples with label -1 in either are left out.
        second: (N,) int64.

    Source:
        Vinh, Epps, Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11 (2010).
    """
    known = (first >= 0) & (second >= 0)
    first, second = first[known], second[known]
    width = int(second.max()) + 1 if len(second) else 1
    joint = torch.unique(first * width + second, return_counts=True)[1]  # of two rows at once takes far longer
    a, b = torch.bincount(first).double(), torch.bincount(second).double()
    joint, total = joint.double(), joint.sum().double()
    if len(joint) in (int((a > 0).sum()), int((b > 0).sum())) and len(a[a > 0]) == len(b[b > 0]):
        return 1.0, 1.0  # the same partition, one cluster or N clusters included, where expectation and maximum meet
    rand, rand_a, rand_b = (_pairs(x).sum() for x in (joint, a, b))
    chance = rand_a * rand_b / _pairs(total)
    information = _entropy(a, total) + _entropy(b, total) - _entropy(joint, total)
    expected = _expected_information(a[a > 0], b[b > 0], total)
    most = (_entropy(a, total) + _entropy(b, total)) / 2
    return float((rand - chance) / ((rand_a + rand_b) / 2 - chance)), float((information - expected) / (most - expected))


def _pairs(counts: Tensor) -> Tensor:
    return counts * (counts - 1) / 2


def _entropy(counts: Tensor, total: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(counts / total).sum()
    return entropy


def _expected_information(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """Expected mutual information of labelings with cluster sizes a and b: hypergeometric, one sum for each pair of sizes."""
    (sizes_a, many_a), (sizes_b, many_b) = (torch.unique(x, return_counts=True) for x in (a, b))
    expected = total.new_zeros(())
    for size_a, many in zip(sizes_a, many_a, strict=True):
        overlap = torch.arange(1, int(size_a) + 1, device=a.device, dtype=torch.float64)[:, None]
        outside = total - size_a - sizes_b + overlap
        possible = (overlap <= sizes_b) & (outside >= 0)
        log_chance = (
            _log_choose(size_a, overlap)
            + _log_choose(total - size_a, (sizes_b - overlap).clamp(min=0))
            - _log_choose(total, sizes_b)
        )
        value = overlap / total * (total * overlap / (size_a * sizes_b)).log() * log_chance.exp()
        expected += many * (value.where(possible, 0).sum(0) * many_b).sum()
    return expected


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
