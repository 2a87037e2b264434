"""Prototypical Back Translation: a teacher's clusters as prototypes in the student's own space."""

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import accumulation_dtype, sum_dtype
from ._labels import label_range

BLOCK_ROWS = 2**16  # rows that are copied to the dtype of sums at a time


def back_translate(
    labels: Tensor, features: Tensor, num_prototypes: int, *, check_values: bool | None = None
) -> tuple[Tensor, Tensor]:
    r"""Prototypes in the student's space: the mean of its own features over the samples of each teacher cluster.

    .. math::
        P_k = \frac{1}{n_k} \sum_{i : a_i = k} h_i, \qquad n_k = |\{i : a_i = k\}|

    Grouping is thus decoupled from alignment: the student is pulled to where *its own* features of the cluster lie, however
    large the gap between the modalities, and a teacher may have any width. One pass over the features, in a fixed order: the
    same input gives the same bits, on CUDA too. Not normalised, as in the paper. The result is a constant.

    Args:
        labels: (N,) int64, the teacher's cluster of each sample; rows with label -1 are left out.
        features: (N, D) the student's features.
        num_prototypes: number K of clusters of the teacher.
        check_values: read the values to check label range and finiteness. None means on CPU in eager mode only.

    Returns:
        ``(prototypes, counts)``: (K, D) in float32 (float64 for float64), an empty cluster's row being zero, and (K,) int64.

    Raises:
        TypeError: labels that are not int64, features that are not floating point.
        ValueError: different N, labels outside [-1, K), non-finite features.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> back_translate(torch.tensor([0, 0, 2]), features, num_prototypes=3)
        (tensor([[0.5000, 0.5000],
                [0.0000, 0.0000],
                [2.0000, 2.0000]]), tensor([2, 0, 1]))

    Source:
        ProtoCLIP section III-C, https://arxiv.org/abs/2206.10996.
    """
    sums, counts = segment_sum(labels, features, num_prototypes, check_values=check_values)
    return segment_mean(sums, counts).to(accumulation_dtype(features.dtype)), counts


def segment_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Sums (K, D) over counts (K,), with a zero row where nothing was counted."""
    return sums / counts.clamp(min=1)[:, None].to(sums.dtype)


@torch.no_grad()
def segment_sum(
    labels: Tensor, features: Tensor, num_prototypes: int, *, check_values: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Sum (K, D) of the features of each label, in the device's sum dtype, and their number (K,); label -1 is left out."""
    check.positive_int("num_prototypes", num_prototypes)
    check.matrix("features", features)
    check.integers("labels", labels, length=features.shape[0], of=" as features has rows")
    check.same_device("labels", labels, "features", features)
    if check.values_are_checked(features, check_values):
        ignored = labels == -1
        label_range("labels", labels.where(~ignored, 0), num_prototypes, " or be -1")
        check.finite("features", features[~ignored] if bool(ignored.any()) else features)
    else:
        torch._assert_async(((labels >= -1) & (labels < num_prototypes)).all())
    sums = torch.zeros((num_prototypes, features.shape[1]), dtype=sum_dtype(features.device), device=features.device)
    counts = torch.zeros(num_prototypes, dtype=torch.int64, device=features.device)
    for start in range(0, max(1, len(labels)), BLOCK_ROWS):
        own, x = labels[start : start + BLOCK_ROWS], features.detach()[start : start + BLOCK_ROWS].to(sums.dtype)
        # Samples sorted by label are bags of rows, and a bag is summed in order. Bag 0 holds the samples that are left out.
        sizes = torch.bincount(own + 1, minlength=num_prototypes + 1)
        bags = torch.nn.functional.embedding_bag(own.argsort(stable=True), x, sizes.cumsum(0) - sizes, mode="sum")
        sums, counts = sums + bags[1:], counts + sizes[1:]
    return sums, counts
