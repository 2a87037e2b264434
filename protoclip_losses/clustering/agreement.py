"""How far two labelings of the same samples agree beyond chance: adjusted Rand index and adjusted mutual information."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check

# Terms of the expected mutual information per block: about ten float64 temporaries of this length are alive at once, 5 MB.
BLOCK_TERMS = 2**16


def adjusted_rand_score(labels_true: Tensor, labels_pred: Tensor) -> float:
    r"""Adjusted Rand index: how far two labelings put the same pairs of samples together, beyond chance.

    .. math::
        \mathrm{ARI} = \frac{\mathrm{R} - \mathbb{E}[\mathrm{R}]}{\max \mathrm{R} - \mathbb{E}[\mathrm{R}]}, \qquad
        \mathrm{R} = \sum_{ij} \binom{n_{ij}}{2}, \quad
        \mathbb{E}[\mathrm{R}] = \sum_i \binom{a_i}{2} \sum_j \binom{b_j}{2} \Big/ \binom{N}{2}

    where :math:`n_{ij}` samples are in cluster i of one labeling, of size :math:`a_i`, and in cluster j of the other, of size
    :math:`b_j`. The maximum is the mean of both labelings' own number of pairs. scikit-learn's function of the same name, on
    tensors.

    **Use it when:** two labelings have to be compared by a measure that weighs large clusters most.
    **Not when:** clusters differ much in size and the small ones matter: :func:`adjusted_mutual_info_score` is fairer to them.
    **Related:** :func:`~protoclip_losses.metrics.grouping` clusters features first.

    Args:
        labels_true: (N,), any integer dtype. A sample whose label is -1 here or in `labels_pred` is left out.
        labels_pred: (N,), any integer dtype, on the same device. The order of the two does not matter.

    Returns:
        1 for the same partition, about 0 for unrelated ones, at least -0.5. No sample at all: 1, as in scikit-learn.

    Raises:
        TypeError: labels that are not integer tensors.
        ValueError: lengths or devices that differ, a label below -1.

    Example:
        >>> import torch
        >>> adjusted_rand_score(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 2, 2]))
        1.0
        >>> round(adjusted_rand_score(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1])), 4)
        0.5714

    Source:
        Hubert, Arabie, "Comparing partitions", Journal of Classification 2 (1985).
    """
    return _rand(_contingency(*_checked(labels_true, labels_pred)))


def adjusted_mutual_info_score(labels_true: Tensor, labels_pred: Tensor) -> float:
    r"""Adjusted mutual information: how much one labeling tells of the other, beyond chance.

    .. math::
        \mathrm{AMI} = \frac{I - \mathbb{E}[I]}{\tfrac12 (H_a + H_b) - \mathbb{E}[I]}, \qquad
        I = \sum_{ij} \frac{n_{ij}}{N} \log \frac{N\, n_{ij}}{a_i b_j}

    where :math:`n_{ij}` samples are in cluster i of one labeling, of size :math:`a_i`, and in cluster j of the other, of size
    :math:`b_j`; H are the entropies. The expectation is over random labelings with the same cluster sizes. scikit-learn's
    function of the same name (its default, the arithmetic mean), on tensors. Time grows with the samples and with the square of
    the number of *different* cluster sizes, not with the product of the numbers of clusters; memory with the samples alone.

    **Use it when:** clusters are many, or differ much in size.
    **Not when:** only pairs in the same cluster count: :func:`adjusted_rand_score`, which is also faster.
    **Related:** :func:`~protoclip_losses.metrics.grouping` clusters features first.

    Args:
        labels_true: (N,), any integer dtype. A sample whose label is -1 here or in `labels_pred` is left out.
        labels_pred: (N,), any integer dtype, on the same device. The order of the two does not matter.

    Returns:
        1 for the same partition, about 0 for unrelated ones. No sample at all: 1, as in scikit-learn.

    Raises:
        TypeError: labels that are not integer tensors.
        ValueError: lengths or devices that differ, a label below -1.

    Example:
        >>> import torch
        >>> adjusted_mutual_info_score(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 2, 2]))
        1.0
        >>> round(adjusted_mutual_info_score(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1])), 4)
        0.5714

    Source:
        Vinh, Epps, Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11 (2010).
    """
    return _information(_contingency(*_checked(labels_true, labels_pred)))


def adjusted_agreement(labels_true: Tensor, labels_pred: Tensor) -> tuple[float, float]:
    """:func:`adjusted_rand_score` and :func:`adjusted_mutual_info_score` from one contingency table; labels are not checked."""
    table = _contingency(labels_true, labels_pred)
    return _rand(table), _information(table)


@dataclass(frozen=True)
class _Contingency:
    """Number of samples in each cluster of either labeling and in each overlap of two clusters: float64, on the CPU."""

    a: Tensor
    b: Tensor
    joint: Tensor
    total: Tensor

    @property
    def is_same_partition(self) -> bool:
        """Both scores are 1 then: with one cluster or N clusters in both labelings, the formulas are 0/0."""
        return len(self.a) == len(self.b) == len(self.joint)


def _checked(labels_true: Tensor, labels_pred: Tensor) -> tuple[Tensor, Tensor]:
    check.integers("labels_true", labels_true, any_dtype=True)
    check.integers("labels_pred", labels_pred, any_dtype=True, length=len(labels_true), of=" as labels_true")
    check.same_device("labels_pred", labels_pred, "labels_true", labels_true)
    labels_true, labels_pred = labels_true.long(), labels_pred.long()
    for name, labels in (("labels_true", labels_true), ("labels_pred", labels_pred)):
        if len(labels) and int(labels.min()) < -1:
            raise ValueError(f"{name} must be -1 (in no cluster) or more, got {int(labels.min())}")
    return labels_true, labels_pred


def _contingency(first: Tensor, second: Tensor) -> _Contingency:
    known = (first >= 0) & (second >= 0)
    first, second = _countable(first[known]), _countable(second[known])
    width = int(second.max()) + 1 if len(second) else 1
    joint = torch.unique(first * width + second, return_counts=True)[1]  # of two rows at once takes far longer
    # On the CPU from here on: log-gamma of a number of samples needs float64, which not every device has.
    a, b, joint = (x.cpu().double() for x in (torch.bincount(first), torch.bincount(second), joint))
    return _Contingency(a[a > 0], b[b > 0], joint, joint.sum())


def _countable(labels: Tensor) -> Tensor:
    """The same partition with small labels: a cluster may be named by any int64, a hash for instance."""
    if len(labels) == 0 or int(labels.max()) < 2 * len(labels) + 1024:
        return labels
    numbers: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbers


def _rand(table: _Contingency) -> float:
    if table.is_same_partition:
        return 1.0
    rand, rand_a, rand_b = (_pairs(x).sum() for x in (table.joint, table.a, table.b))
    chance = rand_a * rand_b / _pairs(table.total)
    return float((rand - chance) / ((rand_a + rand_b) / 2 - chance))


def _information(table: _Contingency) -> float:
    if table.is_same_partition:
        return 1.0
    if {len(table.a), len(table.b)} & {1, int(table.total)}:
        return 0.0  # every labeling shares the same information with one cluster, or with N: nothing is beyond chance
    h_a, h_b, h_joint = (torch.special.entr(x / table.total).sum() for x in (table.a, table.b, table.joint))
    expected = _expected_information(table.a, table.b, table.total)
    return float((h_a + h_b - h_joint - expected) / ((h_a + h_b) / 2 - expected))


def _pairs(counts: Tensor) -> Tensor:
    return counts * (counts - 1) / 2


def _expected_information(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    r"""Expected mutual information of labelings with cluster sizes a and b: one hypergeometric sum for each pair of sizes.

    An overlap farther than t from its mean m has a probability below :math:`2 \exp(-t^2 / (2m + 2t/3))` (Bernstein, which holds
    for sampling without replacement, Hoeffding 1963); where that is below e^-80 it is left out. Each pair of sizes leaves another
    number of overlaps: they are concatenated and computed in blocks.
    """
    (sizes_a, many_a), (sizes_b, many_b) = (torch.unique(x, return_counts=True) for x in (a, b))
    expected, log_choices = total.new_zeros(()), _log_choose(total, sizes_b)
    for size_a, many in zip(sizes_a, many_a, strict=True):
        mean = size_a * sizes_b / total
        reach = 80 / 3 + (160 * mean + (80 / 3) ** 2).sqrt()
        least = torch.maximum(size_a + sizes_b - total, (mean - reach).floor()).clamp(min=1)
        most = torch.minimum(torch.minimum(size_a, sizes_b), (mean + reach).ceil())
        counts = (most - least + 1).long()
        ends = counts.cumsum(0)
        first = least - (ends - counts)
        for start in range(0, int(ends[-1]), BLOCK_TERMS):
            term = torch.arange(start, min(start + BLOCK_TERMS, int(ends[-1])), device=ends.device)
            pair = torch.searchsorted(ends, term, right=True)
            overlap, size_b = first[pair] + term, sizes_b[pair]
            log_chance = _log_choose(size_a, overlap) + _log_choose(total - size_a, size_b - overlap) - log_choices[pair]
            information = overlap / total * (total * overlap / (size_a * size_b)).log()
            expected += many * (log_chance.exp() * information * many_b[pair]).sum()
    return expected


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
