"""Cross-entropy of student features against prototypes."""

import math

import torch
from torch import Tensor

from .. import _checks as check
from ..kernels import blocks
from ..kernels import prototype_cross_entropy as kernel
from ..kernels.blocks import product_dtype, rows_per_block
from .soft_targets import base_prototypes


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: Tensor | None = None,
    valid: Tensor | None = None,
    ignore_index: int = -1,
    chunk_size: int | None = None,
    check_values: bool | None = None,
) -> Tensor:
    r"""Cross-entropy of student features over K prototypes, with hard or soft targets, without a B x K tensor.

    .. math::
        \mathcal{L} = \frac{1}{n} \sum_{i : a_i \ne \mathrm{ignore}}
        \left[ \log \sum_{j=1}^{K} \exp(s\, h_i \cdot P_j) - s\, h_i \cdot M_{a_i} \right]

    where :math:`h_i` are the student's features, :math:`P` the prototypes in its space, :math:`a_i` the teacher's labels,
    :math:`s` the exponentiated scale and :math:`n` the number of rows that are not ignored. Hard targets are
    :math:`M = P`. With the soft targets :math:`M = Y P` of :func:`soft_targets` this *is* the soft cross-entropy
    :math:`-\sum_j Y_{a_i j} \log p_{ij}`, exactly, since the student's logits are linear in :math:`h`.

    Args:
        features: (B, D) student features, L2-normalised by the caller. They set the dtype of the products.
        prototypes: (K, D). May require gradient.
        labels: (B,) int64, the teacher's cluster of each row.
        logit_scale: :math:`s`, already exponentiated: a float, () or (1,). Gradients flow to it.
        targets: (K, D), :math:`M`; None means hard targets. May require gradient.
        valid: (K,) bool; a prototype that is not valid takes no probability mass. None means all are.
        ignore_index: rows with this label count neither in the sum nor in :math:`n`; with none left the loss is 0.
        chunk_size: rows of B worked on at a time; any value gives the same answer. None lets the library choose.
        check_values: read the values to check labels and finiteness. None means on CPU in eager mode only.

    Returns:
        The loss, a () tensor in float32 (float64 for float64 features).

    Raises:
        TypeError: features that are not floating point, labels that are not int64, a mask that is not bool.
        ValueError: shapes that do not match, labels out of range, a hard label of an invalid prototype, a non-finite input.

    Example:
        >>> import torch
        >>> prototypes = torch.eye(3)
        >>> prototype_cross_entropy(prototypes, prototypes, torch.tensor([0, 1, 2]), 1.0)  # log(1 + 2/e)
        tensor(0.5514)

    Source:
        ProtoCLIP section III-B and III-C, https://arxiv.org/abs/2206.10996.
    """
    if targets is not None:
        check.matrix("targets", targets, rows=_rows(prototypes), width=_width(prototypes), of=" as prototypes")
        check.same_device("targets", targets, "features", features)
    keep, safe = check_term(features, prototypes, labels, valid, ignore_index, targets is None, check_values)
    scale = check.scale("logit_scale", logit_scale, features, check_values)
    check.chunk_rows(chunk_size)
    base = base_prototypes(safe, valid)
    offsets = None
    if targets is not None:
        offsets = targets.index_select(0, safe).to(scale.dtype) - prototypes.index_select(0, base).to(scale.dtype)
    total, _ = prototype_sum(features, prototypes, base, keep, scale, offsets, valid, chunk_size)
    return mean_of_kept(total, keep, check_values, features=features, prototypes=prototypes, targets=targets)


def _rows(x: Tensor) -> int | None:
    return x.shape[0] if isinstance(x, Tensor) and x.dim() == 2 else None


def _width(x: Tensor) -> int | None:
    return x.shape[1] if isinstance(x, Tensor) and x.dim() == 2 else None


def check_term(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    ignore_index: int,
    hard: bool,
    check_values: bool | None,
    names: tuple[str, str] = ("features", "prototypes"),
) -> tuple[Tensor | None, Tensor]:
    """Check one term's inputs; return the rows that count (B,) bool, None where it is known that all do, and safe labels.

    Labels of rows that do not count become 0, so that they can be used as an index.
    """
    student, columns = names
    check.matrix(student, features)
    check.matrix(columns, prototypes, width=features.shape[1], of=f" as {student}")
    check.integers("labels", labels, length=features.shape[0], of=f" as {student} has rows")
    check.valid_mask(valid, prototypes.shape[0])
    for name, x in ((columns, prototypes), ("labels", labels), ("valid", valid)):
        if x is not None:
            check.same_device(name, x, student, features)
    if prototypes.shape[0] == 0:
        raise ValueError(f"{columns} must have at least one row, got shape {check.shape(prototypes)}")
    if not check.values_are_checked(features, check_values):
        counted = labels != ignore_index
        return counted, labels.where(counted, 0)
    keep, safe = None, labels
    if not check.labels_within(labels, prototypes.shape[0], ignore_index):
        keep = labels != ignore_index
        safe = labels.where(keep, 0)
        check.label_range("labels", safe, prototypes.shape[0], f" or be ignore_index={ignore_index}")
        keep = None if bool(keep.all()) else keep
    if valid is not None:
        check.labels_valid("labels", safe, keep, valid, hard)
    return keep, safe


def mean_of_kept(total: Tensor, keep: Tensor | None, check_values: bool | None, **inputs: Tensor | None) -> Tensor:
    """A sum over the rows in ``keep`` over their number, or the error that names the input that made it non-finite.

    Of the inputs the first are the features. They are read only once the sum is non-finite: a softmax hides no NaN and no Inf.
    """
    features = next(iter(inputs.values()))
    assert features is not None
    if check.values_are_checked(features, check_values) and not math.isfinite(float(total.detach())):
        for name, x in inputs.items():
            if x is not None:
                check.finite(name, x[keep] if x is features and keep is not None else x)
        raise ValueError(f"logit_scale is too large: the loss overflowed although {', '.join(inputs)} are finite")
    return total / (max(1, features.shape[0]) if keep is None else keep.sum().clamp(min=1))


def prototype_sum(
    features: Tensor,
    prototypes: Tensor,
    base: Tensor,
    keep: Tensor | None,
    scale: Tensor,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int | None = None,
    with_accuracy: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Sum over the rows in ``keep`` of the term's loss, and how many of them put the base first (if asked for).

    With base b and offset :math:`M_a - P_b`, the soft loss is the hard loss for b less :math:`s\, h \cdot (M_a - P_b)`. Both
    are small where the loss is, so that no digits are lost to a difference of large numbers. Hard targets have no offset.
    """
    dtype = product_dtype(features)
    h, prototypes = features.to(dtype), prototypes.to(dtype)
    if valid is not None:
        prototypes = prototypes.where(valid[:, None], 0)
    if keep is not None:
        h = h.where(keep[:, None], 0)
    if offsets is not None:
        offsets = offsets.to(scale.dtype)
        if keep is not None:
            offsets = offsets.where(keep[:, None], 0)
    rows, columns = h.shape[0], prototypes.shape[0]
    small = chunk_size is None and rows * columns <= blocks.DENSE_LOGITS
    # Autograd would round in between in low precision, and cannot save what was made in inference mode.
    if small and dtype == scale.dtype and not made_in_inference_mode(prototypes, base):
        return kernel.dense_nll_sum(h, prototypes, scale, base, keep, valid, offsets, with_accuracy)
    learned = None
    if offsets is not None and offsets.requires_grad:
        offsets, learned = None, offsets
    chunk = rows_per_block(columns, dtype, chunk_size)
    total, correct = kernel.label_nll_sum(h, prototypes, scale, base, keep, valid, offsets, chunk, with_accuracy)
    if learned is not None:
        total = total - scale * (h * learned).sum()
    return total, correct


def made_in_inference_mode(*inputs: Tensor) -> bool:
    """Whether any of these is an inference tensor, which keeps no version and cannot be saved for backward."""
    return not torch.compiler.is_compiling() and any(x.is_inference() for x in inputs)
