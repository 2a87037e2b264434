"""The prototype kernel: hard-label cross-entropy over K prototypes, loss and gradient in one pass over blocks of rows.

Per row, with p = softmax_j(s h.P_j) and label a::

    loss = -log p_a
    d loss / d h = s (sum_j p_j P_j - P_a),   d loss / d s = h.(sum_j p_j P_j - P_a),   d loss / d P_j = s (p_j - [j = a]) h

so forward and backward together take two K-wide products per block (three when the prototypes are learned), and no more
memory than a block of logits. Soft targets M_a are the hard one and a constant offset o = M_a - P_a, which takes s h.o from the
loss, s o from d loss / d h and h.o from d loss / d s.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import run
from .blocks import LogitBlocks, softmax_nll

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def label_nll(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    valid: Tensor | None,
    offsets: Tensor | None,
    chunk: int,
    with_gradient: bool,
    with_prototype_gradient: bool,
    with_accuracy: bool,
) -> Result:
    """Sum of the losses of the rows in ``keep`` (None: all), how many of them put their label first, and the gradients.

    Offsets (B, D) are of the targets relative to the labels' prototypes, None for hard targets. Gradients are those of the sum,
    with respect to features (B, D), prototypes (K, D) and scale (); what is not asked for is empty or zero. Features and
    offsets of rows that are not kept must be zero, and what they get as gradient is to be left out.
    """
    batch, width = features.shape
    total = scale.new_zeros(())
    correct = scale.new_zeros(())
    grad_scale = scale.new_zeros(())
    grad_features = scale.new_empty((batch if with_gradient else 0, width))
    grad_prototypes = scale.new_zeros((prototypes.shape[0] if with_prototype_gradient else 0, width))
    with torch.autocast(features.device.type, enabled=False):
        blocks = LogitBlocks(prototypes, scale, min(chunk, batch), narrow=prototypes.dtype == torch.bfloat16)
        for start in range(0, batch, chunk):
            rows = slice(start, start + chunk)
            h, label = features[rows], labels[rows]
            logits = blocks(h)
            if valid is not None:
                logits.masked_fill_(~valid, -torch.inf)
            if with_accuracy:
                correct += label_first(logits, label, None if keep is None else keep[rows])
            lacking, nll = softmax_nll(logits, label, h, prototypes, scale)
            total += (nll if keep is None else nll * keep[rows]).sum()
            if offsets is not None:
                total -= torch.sum(offsets[rows] * h) * scale
            logits[torch.arange(len(label), device=label.device), label] = lacking.to(logits.dtype)
            residual = blocks.rounded(logits)  # p - onehot
            if with_gradient:
                direction = torch.mm(residual, prototypes).to(scale.dtype)
                if offsets is not None:
                    direction -= offsets[rows]
                grad_scale += torch.sum(direction * h)
                torch.mul(direction, scale, out=grad_features[rows])
            if with_prototype_gradient:
                grad_prototypes += residual.T @ (h * scale).to(features.dtype)
    return total, correct, grad_features, grad_prototypes, grad_scale


def label_first(logits: Tensor, labels: Tensor, keep: Tensor | None) -> Tensor:
    """How many rows (of those in ``keep``) no logit of which is larger than the label's."""
    first = logits.gather(1, labels[:, None])[:, 0] >= logits.amax(1)
    return (first if keep is None else first & keep).sum()


label_nll_operator = torch.library.custom_op(
    "protoclip_losses::label_nll",
    label_nll,
    mutates_args=(),
    schema="(Tensor features, Tensor prototypes, Tensor scale, Tensor labels, Tensor? keep, Tensor? valid, Tensor? offsets, "
    "SymInt chunk, "
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
    scale: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    valid: Tensor | None,
    offsets: Tensor | None,
    chunk: int,
    with_accuracy: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`label_nll` under autograd: the sum, differentiable, and the count."""
    grad = torch.is_grad_enabled()
    with_gradient = grad and (features.requires_grad or scale.requires_grad)
    inputs = features, prototypes, scale, labels, keep, valid, offsets, chunk
    flags = with_gradient, grad and prototypes.requires_grad, with_accuracy
    return run("prototype_cross_entropy", label_nll, label_nll_operator, *inputs, *flags)


def dense_nll_sum(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    valid: Tensor | None,
    offsets: Tensor | None,
    with_accuracy: bool,
) -> tuple[Tensor, Tensor]:
    """What :func:`label_nll_sum` returns, by the dense expression."""
    logits = (features * scale) @ prototypes.T
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    correct = label_first(logits.detach(), labels, keep).to(scale.dtype) if with_accuracy else scale.new_zeros(())
    if keep is None:
        total = F.cross_entropy(logits, labels, reduction="sum")
    else:
        total = F.cross_entropy(logits, labels, reduction="none").where(keep, 0).sum()
    if offsets is not None:
        total = total - scale * (features * offsets).sum()
    return total, correct
