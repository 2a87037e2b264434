"""The prototype kernel: hard-label cross-entropy over K prototypes, loss and gradient in one pass over blocks of rows.

Per row, with p = softmax_j(s h.P_j) and label a::

    loss = -log p_a
    d loss / d h = s (sum_j p_j P_j - P_a),   d loss / d s = h.(sum_j p_j P_j - P_a),   d loss / d P_j = s (p_j - [j = a]) h

so forward and backward together take two K-wide products per block (three when the prototypes are learned), and no more
memory than a block of logits.
"""

from typing import Any

import torch
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
    chunk: int,
    with_gradient: bool,
    with_prototype_gradient: bool,
    with_accuracy: bool,
) -> Result:
    """Sum of the losses of the rows in ``keep`` (None: all), how many of them put their label first, and the gradients.

    Gradients are those of the sum, with respect to features (B, D), prototypes (K, D) and scale (); what is not asked for is
    empty or zero. Features of rows that are not kept must be finite.
    """
    batch, width = features.shape
    total = scale.new_zeros(())
    correct = scale.new_zeros(())
    grad_scale = scale.new_zeros(())
    grad_features = scale.new_empty((batch if with_gradient else 0, width))
    grad_prototypes = scale.new_zeros((prototypes.shape[0] if with_prototype_gradient else 0, width))
    with torch.autocast(features.device.type, enabled=False):
        blocks = LogitBlocks(prototypes, scale, min(chunk, batch))
        for start in range(0, batch, chunk):
            rows = slice(start, start + chunk)
            h, label = features[rows], labels[rows, None]
            logits = blocks(h)
            if valid is not None:
                logits.masked_fill_(~valid, -torch.inf)
            own, nll = softmax_nll(logits, label, h, prototypes, scale)
            if with_accuracy:
                first = own >= logits.amax(1, keepdim=True)
                correct += (first if keep is None else first & keep[rows, None]).sum()
            total += (nll if keep is None else nll * keep[rows, None]).sum()
            if not (with_gradient or with_prototype_gradient):
                continue
            residual = blocks.rounded(logits.scatter_(1, label, own.sub_(1)))  # p - onehot
            if keep is not None:
                residual *= keep[rows, None]
            if with_gradient:
                direction = torch.mm(residual, prototypes).to(scale.dtype)
                grad_scale += torch.sum(direction * h)
                torch.mul(direction, scale, out=grad_features[rows])
            if with_prototype_gradient:
                grad_prototypes += residual.T @ (h * scale).to(features.dtype)
    return total, correct, grad_features, grad_prototypes, grad_scale


label_nll_operator = torch.library.custom_op(
    "protoclip_losses::label_nll",
    label_nll,
    mutates_args=(),
    schema="(Tensor features, Tensor prototypes, Tensor scale, Tensor labels, Tensor? keep, Tensor? valid, SymInt chunk, "
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


def label_nll_sum(features: Tensor, prototypes: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """:func:`label_nll` under autograd: the sum, differentiable, and the count."""
    grad = torch.is_grad_enabled()
    with_gradient = grad and (features.requires_grad or scale.requires_grad)
    *inputs, with_accuracy = rest
    flags = with_gradient, grad and prototypes.requires_grad, with_accuracy
    return run("prototype_cross_entropy", label_nll, label_nll_operator, features, prototypes, scale, *inputs, *flags)
