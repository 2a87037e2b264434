"""The prototype kernel: hard-label cross-entropy over K prototypes, loss and gradient in one pass over blocks of rows.

Per row, with p = softmax_j(s h.P_j) and label a::

    loss = -log p_a
    d loss / d h = s (sum_j p_j P_j - P_a),   d loss / d s = h.(sum_j p_j P_j - P_a),   d loss / d P_j = s (p_j - [j = a]) h

so forward and backward together take two K-wide products per block (three when the prototypes are learned), and no more
memory than a block of logits. A soft target M_a is the hard target P_a plus a constant delta d = M_a - P_a, which subtracts
s h.d from the loss, s d from d loss / d h and h.d from d loss / d s.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import without_autocast
from .autograd import recomputed_blocks, run
from .blocks import BlockSums, LogitBlocks, label_is_first, product_dtype, put_at_labels, softmax_nll
from .sizes import RECOMPUTED, BlockLimit, can_be_dense, rows_per_block

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def label_nll(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    labels: Tensor,
    row_mask: Tensor | None,
    valid: Tensor | None,
    target_delta: Tensor | None,
    chunk: int,
    with_gradient: bool,
    with_prototype_gradient: bool,
    with_accuracy: bool,
) -> Result:
    """Sum of the losses of the rows in ``row_mask`` (None: all), how many of them put their label first, and the gradients.

    ``target_delta`` (B, D) holds the targets less the labels' prototypes, None for hard targets. Gradients are those of the
    sum, with respect to features (B, D), prototypes (K, D) and scale (); what is not asked for is empty or zero. Features and
    deltas of masked rows must be zero, and the gradient they get must not be used.
    """
    batch, width = features.shape
    sums = BlockSums(scale)
    grad_features = scale.new_empty((batch if with_gradient else 0, width))
    grad_prototypes = scale.new_zeros((prototypes.shape[0] if with_prototype_gradient else 0, width))
    invalid = None if valid is None else ~valid
    with without_autocast(features.device.type):
        logit_blocks = LogitBlocks(prototypes, scale, min(chunk, batch), narrow=prototypes.dtype == torch.bfloat16)
        for start in range(0, batch, chunk):
            rows = slice(start, start + chunk)
            h, label = features[rows], labels[rows]
            counted = None if row_mask is None else row_mask[rows]
            logits = logit_blocks(h)
            if invalid is not None:
                logits.masked_fill_(invalid, -torch.inf)
            own_residual, nll, is_first = softmax_nll(logits, label, h, prototypes, scale, with_accuracy)
            sums.add("loss", nll if counted is None else nll.masked_fill(~counted, 0))  # infinite at a label that is not valid
            if is_first is not None:
                sums.add("correct", is_first if counted is None else is_first & counted)
            if target_delta is not None:
                sums.add("delta", target_delta[rows] * h)
            put_at_labels(logits, label, own_residual)
            residual = logit_blocks.rounded(logits)  # p - onehot
            if with_gradient:
                direction = torch.mm(residual, prototypes).to(scale.dtype)
                if target_delta is not None:
                    direction -= target_delta[rows]
                sums.add("scale", direction * h)
                torch.mul(direction, scale, out=grad_features[rows])
            if with_prototype_gradient:
                grad_prototypes += residual.T @ (h * scale).to(features.dtype)
    total = sums.of("loss")
    if target_delta is not None:
        total = total - sums.of("delta") * scale
    return total, sums.of("correct"), grad_features, grad_prototypes, sums.of("scale")


label_nll_operator = torch.library.custom_op(
    "protoclip_losses::label_nll",
    label_nll,
    mutates_args=(),
    schema="(Tensor features, Tensor prototypes, Tensor scale, Tensor labels, Tensor? row_mask, Tensor? valid, "
    "Tensor? target_delta, SymInt chunk, "
    "bool with_gradient, bool with_prototype_gradient, bool with_accuracy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@label_nll_operator.register_fake
def _fake(features: Tensor, prototypes: Tensor, scale: Tensor, *rest: Any) -> Result:
    *_, with_gradient, with_prototype_gradient, _ = rest
    return (
        scale.new_empty(()),
        scale.new_empty(()),
        scale.new_empty((features.shape[0] if with_gradient else 0, features.shape[1])),
        scale.new_empty((prototypes.shape[0] if with_prototype_gradient else 0, features.shape[1])),
        scale.new_empty(()),
    )


def label_nll_sum(
    features: Tensor,
    prototypes: Tensor,
    base: Tensor,
    row_mask: Tensor | None,
    scale: Tensor,
    target_delta: Tensor | None = None,
    valid: Tensor | None = None,
    limit: BlockLimit | None = None,
    with_accuracy: bool = False,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Sum over the rows in ``row_mask`` of the term's loss, differentiable, and how many of them put their base first.

    With ``mean`` that sum over their number, 0 if there are none.

    With base b and delta :math:`M_a - P_b`, the soft loss is the hard loss for b less :math:`s\, h \cdot (M_a - P_b)`. Both
    are small where the loss is, so no digits are lost to a difference of large numbers. Hard targets have no delta.
    """
    h, prototypes, target_delta = _prepared(features, prototypes, row_mask, scale, target_delta, valid)
    rows, columns = h.shape[0], prototypes.shape[0]
    limit = limit or BlockLimit()
    is_small = can_be_dense(rows * columns, scale.dtype, h.device, limit)
    # Autograd would round in between in low precision, and cannot save what was made in inference mode.
    if is_small and h.dtype == scale.dtype and not made_in_inference_mode(prototypes, base):
        is_done = mean and row_mask is None and target_delta is None and rows > 0
        inputs = h, prototypes, scale, base, row_mask, valid, target_delta, with_accuracy
        total, correct = _dense(*inputs, "mean" if is_done else "sum")
        return total if is_done or not mean else _mean(total, row_mask, rows), correct
    learned = None
    if target_delta is not None and target_delta.requires_grad:
        target_delta, learned = None, target_delta
    grad = torch.is_grad_enabled()
    flags = grad and (h.requires_grad or scale.requires_grad), grad and prototypes.requires_grad, with_accuracy
    chunk = rows_per_block(columns, h.dtype, h.device, limit)
    of_kernel = h, prototypes, scale, base, row_mask, valid, target_delta, chunk
    total, correct = run("prototype_cross_entropy", label_nll, label_nll_operator, *of_kernel, *flags)
    if learned is not None:
        total = total - scale * (h * learned).sum()
    return _mean(total, row_mask, rows) if mean else total, correct


def _mean(total: Tensor, row_mask: Tensor | None, rows: int) -> Tensor:
    return total / (max(1, rows) if row_mask is None else row_mask.sum().clamp(min=1))


def label_nll_rows(
    features: Tensor,
    prototypes: Tensor,
    base: Tensor,
    row_mask: Tensor | None,
    scale: Tensor,
    target_delta: Tensor | None = None,
    valid: Tensor | None = None,
    limit: BlockLimit | None = None,
) -> Tensor:
    """Each row's loss, (B,), 0 where masked, by a dense expression for each block of rows that backward runs again."""
    h, prototypes, target_delta = _prepared(features, prototypes, row_mask, scale, target_delta, valid)

    def rows(block: slice) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            logits = (h[block] @ prototypes.T).to(scale.dtype) * scale
            if valid is not None:
                logits = logits.masked_fill(~valid, -torch.inf)
            nll = F.cross_entropy(logits, base[block], reduction="none")
            if target_delta is not None:
                nll = nll - scale * (h[block] * target_delta[block]).sum(1)
        return nll if row_mask is None else nll.where(row_mask[block], 0)

    chunk = rows_per_block(prototypes.shape[0], scale.dtype, h.device, limit, copies=RECOMPUTED)
    return recomputed_blocks(rows, h.shape[0], chunk)


def made_in_inference_mode(*inputs: Tensor) -> bool:
    """Whether any of these is an inference tensor, which has no version counter and cannot be saved for backward."""
    return not torch.compiler.is_compiling() and any(x.is_inference() for x in inputs)


def _prepared(
    features: Tensor,
    prototypes: Tensor,
    row_mask: Tensor | None,
    scale: Tensor,
    target_delta: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, prototypes and deltas in the dtypes of the kernel, zero where masked or not valid."""
    dtype = product_dtype(features)
    h, prototypes = features.to(dtype), prototypes.to(dtype)
    target_delta = None if target_delta is None else target_delta.to(scale.dtype)
    if valid is not None:
        prototypes = prototypes.masked_fill(~valid[:, None], 0)
    if row_mask is not None:
        left_out = ~row_mask[:, None]
        h = h.masked_fill(left_out, 0)
        target_delta = None if target_delta is None else target_delta.masked_fill(left_out, 0)
    return h, prototypes, target_delta


def _dense(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    labels: Tensor,
    row_mask: Tensor | None,
    valid: Tensor | None,
    target_delta: Tensor | None,
    with_accuracy: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """What :func:`label_nll_sum` returns, by the dense expression: faster for few logits. A mean is one of all rows, hard."""
    logits = (features * scale) @ prototypes.T
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    correct = scale.new_zeros(())
    if with_accuracy:
        first = label_is_first(logits.detach().clone(), labels)
        correct = (first if row_mask is None else first & row_mask).sum().to(scale.dtype)
    if row_mask is None:
        total = F.cross_entropy(logits, labels, reduction=reduction)
    else:
        total = F.cross_entropy(logits, labels, reduction="none").where(row_mask, 0).sum()
    if target_delta is not None:
        total = total - scale * (features * target_delta).sum()
    return total, correct
