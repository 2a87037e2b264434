"""Prototypical Back Translation: a teacher's clusters as prototypes in the student's own space."""

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import accumulation_dtype, assert_on_device, may_read_values, sum_dtype
from ._labels import label_range

BAG_ROWS = 32  # rows that are added in float32, one after the other


def back_translate(
    labels: Tensor, features: Tensor, num_prototypes: int, *, check_values: bool | None = None
) -> tuple[Tensor, Tensor]:
    r"""Prototypes in the student's space: the mean of its own features over the samples of each teacher cluster.

    .. math::
        P_k = \frac{1}{n_k} \sum_{i : a_i = k} h_i, \qquad n_k = |\{i : a_i = k\}|

    Grouping is thus decoupled from alignment: the student is pulled to where *its own* features of the cluster lie, however
    large the gap between the modalities, and a teacher may have any width. One pass over the features, in a fixed order: the
    same input gives the same bits, on CUDA too. Not normalised, as in the paper. The result is a constant.

    **Use it when:** labels and features are there, all on one process.
    **Not when:** features come in batches or lie on several ranks: :class:`protoclip_losses.PrototypicalBackTranslation`.
    **Related:** :func:`soft_targets` takes the prototypes.

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
    """Sum (K, D) of the features of each label, and their number (K,); label -1 is left out.

    A float32 sum of n rows one after the other can be off by n roundings. Here it is one of BAG_ROWS rows at most, and such
    sums are added in float64, or on MPS again as sums of so many.
    """
    check.positive_int("num_prototypes", num_prototypes)
    check.matrix("features", features)
    check.integers("labels", labels, length=features.shape[0], of=" as features has rows")
    check.same_device("labels", labels, "features", features)
    if check.values_are_checked(features, check_values, labels):
        ignored = labels == -1
        label_range("labels", labels.where(~ignored, 0), num_prototypes, " or be -1")
        check.finite("features", features[~ignored] if bool(ignored.any()) else features)
    else:
        assert_on_device((labels >= -1) & (labels < num_prototypes))
    wide = torch.float64 if features.dtype == torch.float64 else sum_dtype(features.device)
    x, order = features.detach().to(accumulation_dtype(features.dtype)), labels.argsort(stable=True)
    counts = sizes = _counts(labels + 1, num_prototypes + 1)  # label 0 stands for the rows that are left out
    reads, most = may_read_values(x, labels), len(x)
    while x.dtype != torch.float64 and (bool((sizes > BAG_ROWS).any()) if reads else most > BAG_ROWS):
        x, sizes = _sums_of_bags(x, order, sizes)
        x, order, most = x.to(wide), torch.arange(len(x), device=x.device), -(-most // BAG_ROWS)
    sums = torch.nn.functional.embedding_bag(order, x, sizes.cumsum(0) - sizes, mode="sum")
    return sums[1:], counts[1:]


def _counts(labels: Tensor, num_labels: int) -> Tensor:
    if may_read_values(labels):
        return torch.bincount(labels, minlength=num_labels)
    return torch.zeros(num_labels, dtype=torch.int64, device=labels.device).index_add_(0, labels, torch.ones_like(labels))


def _sums_of_bags(x: Tensor, order: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of at most BAG_ROWS successive rows of each label, and how many such sums each label has, (K + 1,).

    Where values cannot be read there are as many sums as any labels could need: those at the end are zero.

    Args:
        x: (n, D).
        order: (n,), the rows sorted by label.
        sizes: (K + 1,), how many rows each label has.
    """
    bags = (sizes + (BAG_ROWS - 1)) // BAG_ROWS
    ends = bags.cumsum(0)
    total = int(ends[-1]) if may_read_values(x, sizes) else len(order) // BAG_ROWS + len(sizes)
    bag = torch.arange(total, device=x.device)
    label = torch.searchsorted(ends, bag, right=True).clamp(max=len(sizes) - 1)
    starts = (sizes.cumsum(0) - sizes)[label] + BAG_ROWS * (bag - (ends - bags)[label])
    starts = torch.minimum(starts, sizes.sum())
    return torch.nn.functional.embedding_bag(order, x, starts, mode="sum"), bags
