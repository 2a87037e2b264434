"""Cross-entropy of student features against prototypes."""

import math

from torch import Tensor

from .. import _checks as check
from .._dtypes import assert_on_device
from ..kernels.prototype_cross_entropy import label_nll_rows, label_nll_sum
from ..kernels.sizes import BlockLimit
from ._labels import check_labels, heaviest, label_range, labels_valid, labels_within, mixed, mixture_weights, valid_mask
from .soft_targets import base_prototypes


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    label_weights: Tensor | None = None,
    targets: Tensor | None = None,
    valid: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check_values: bool | None = None,
) -> Tensor:
    r"""Cross-entropy of student features over K prototypes, with hard or soft targets, without a B x K tensor.

    .. math::
        \mathcal{L} = \frac{1}{n} \sum_{i : a_i \ne \mathrm{ignore}}
        \left[ \log \sum_{j=1}^{K} \exp(s\, h_i \cdot P_j) - s\, h_i \cdot M_{a_i} \right]

    where :math:`h_i` are the student's features, :math:`P` the prototypes in its space, :math:`a_i` the teacher's labels,
    :math:`s` the exponentiated scale and :math:`n` the number of rows that are not ignored. Hard targets are
    :math:`M = P`. With the soft targets :math:`M = Y P` of :func:`soft_targets` this *is* the soft cross-entropy
    :math:`-\sum_j Y_{a_i j} \log p_{ij}`, exactly, since the student's logits are linear in :math:`h`. So is a mixture of
    several labels, with :math:`\sum_l w_{il} M_{a_{il}}` in the place of :math:`M_{a_i}`.

    **Use it when:** you have prototypes and labels, and one process.
    **Not when:** K is a few hundred and speed is no matter: ``torch.nn.functional.cross_entropy`` of the dense logits is as good.
    **Related:** :class:`protoclip_losses.PrototypeLoss` counts over processes; :func:`soft_targets` makes ``targets``.

    Args:
        features: (B, D) student features, L2-normalised by the caller. They set the dtype of the products.
        prototypes: (K, D). May require gradient.
        labels: (B,) int64, the teacher's cluster of each row; or (B, L), a mixture of several.
        label_weights: (B, L), not negative, made to sum to 1 over a row's labels that are not ignored; None: equal.
        logit_scale: :math:`s`, already exponentiated: a float, () or (1,). Gradients flow to it.
        targets: (K, D), :math:`M`; None means hard targets. May require gradient.
        valid: (K,) bool; a prototype that is not valid takes no probability mass. None means all are.
        ignore_index: rows with this label count neither in the sum nor in :math:`n`; with none left the loss is 0. Of several
            labels it leaves out one, and a row with no other.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"``: the loss of each row, 0 where
            ignored, whose logits are computed again in backward.
        chunk_size: rows of B worked on at a time; any value gives the same answer. None lets the library choose.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read the values to check labels and finiteness. None means on CPU in eager mode only.

    Returns:
        The loss in float32 (float64 for float64 features): a () tensor, or (B,) with ``reduction="none"``.

    Raises:
        TypeError: features that are not floating point, labels that are not int64, a mask that is not bool.
        ValueError: shapes that do not match, labels out of range, a hard label of an invalid prototype, a non-finite input,
            an unknown reduction.

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
    row_mask, safe = check_term(features, prototypes, labels, valid, ignore_index, targets is None, check_values)
    scale = check.scale("logit_scale", logit_scale, features, check_values)
    limit = BlockLimit(chunk_size, memory_budget)
    check.reduction(reduction)
    if labels.dim() == 2:
        weights, row_mask = mixture_weights(labels, label_weights, row_mask, scale.dtype, check_values)
        base = base_prototypes(heaviest(safe, weights), valid)
        delta: Tensor | None = mixed(targets if targets is not None else prototypes, safe, weights)
    else:
        if label_weights is not None:
            raise ValueError("label_weights need labels (B, L), several for each row, got labels (B,)")
        base = base_prototypes(safe, valid)
        delta = None if targets is None else targets.index_select(0, safe).to(scale.dtype)
    if delta is not None:
        delta = delta - prototypes.index_select(0, base).to(scale.dtype)
    inputs = features, prototypes, base, row_mask, scale, delta, valid, limit
    loss = label_nll_rows(*inputs) if reduction == "none" else label_nll_sum(*inputs, mean=reduction == "mean")[0]
    check_finite_loss(loss, row_mask, check_values, features=features, prototypes=prototypes, targets=targets)
    return loss


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
    """Check one term's inputs; return the mask of labels that are not ignored, None if all are known to count, and labels.

    Both have the shape of the labels, (B,) or (B, L). Ignored labels become 0, so that they can be used as an index.
    """
    student, columns = names
    check.matrix(student, features)
    check.matrix(columns, prototypes, width=features.shape[1], of=f" as {student}")
    check_labels("labels", labels, rows=features.shape[0], of=f" as {student} has rows")
    valid_mask(valid, prototypes.shape[0])
    for name, x in ((columns, prototypes), ("labels", labels), ("valid", valid)):
        if x is not None:
            check.same_device(name, x, student, features)
    if prototypes.shape[0] == 0:
        raise ValueError(f"{columns} must have at least one row, got shape {check.shape(prototypes)}")
    if not check.values_are_checked(features, check_values, prototypes, labels, valid):
        counted = labels != ignore_index
        safe = labels * counted
        within = safe.clamp(0, prototypes.shape[0] - 1)
        good = within == safe
        if valid is not None and hard:
            good &= valid[within] >= counted  # or it does not count
        assert_on_device(good)
        return counted, safe
    row_mask: Tensor | None = None
    safe = labels
    if not labels_within(labels, prototypes.shape[0], ignore_index):
        row_mask = labels != ignore_index
        safe = labels.where(row_mask, 0)
        label_range("labels", safe.flatten(), prototypes.shape[0], f" or be ignore_index={ignore_index}")
        row_mask = None if bool(row_mask.all()) else row_mask
    if valid is not None:
        labels_valid("labels", safe.flatten(), None if row_mask is None else row_mask.flatten(), valid, hard)
    return row_mask, safe


def check_finite_loss(loss: Tensor, row_mask: Tensor | None, check_values: bool | None, **inputs: Tensor | None) -> None:
    """Raise the error that names the input that made the loss non-finite. The first input is the features.

    Inputs are read only once the loss is non-finite: a softmax hides no NaN and no Inf.
    """
    features = next(iter(inputs.values()))
    assert features is not None
    if not check.values_are_checked(loss, check_values):
        return
    if not math.isfinite((loss.detach().sum() if loss.dim() else loss).item()):
        for name, x in inputs.items():
            if x is not None:
                check.finite(name, x[row_mask] if x is features and row_mask is not None else x)
        raise ValueError(f"logit_scale is too large: the loss overflowed although {', '.join(inputs)} are finite")
