"""The prototype kernel: hard-label cross-entropy over K prototypes, loss and gradient in one pass over blocks of rows.

Per row, with p = softmax_j(s h.P_j) and label a::

    loss = -log p_a
    d loss / d h = s (sum_j p_j P_j - P_a),   d loss / d s = h.(sum_j p_j P_j - P_a),   d loss / d P_j = s (p_j - [j = a]) h

so forward and backward together take two K-wide products per block (three when the prototypes are learned), and no more
memory than a block of logits.
"""

import torch
from torch import Tensor

from .blocks import LogitBlocks, softmax_nll

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "protoclip_losses::label_nll",
    mutates_args=(),
    schema="(Tensor features, Tensor prototypes, Tensor labels, Tensor weight, Tensor scale, Tensor? valid, int chunk, "
    "bool with_gradient, bool with_prototype_gradient, bool with_accuracy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def label_nll(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    chunk: int,
    with_gradient: bool,
    with_prototype_gradient: bool,
    with_accuracy: bool,
) -> Result:
    """Weighted sum of the rows' losses, weighted count of rows whose label is the most likely, and the gradients.

    ``weight`` (B,) is in the accumulation dtype. Gradients are those of the sum, with respect to features (B, D), prototypes
    (K, D) and scale (); what is not asked for is empty or zero.
    """
    batch, width = features.shape
    total = weight.new_zeros(())
    correct = weight.new_zeros(())
    grad_scale = weight.new_zeros(())
    grad_features = weight.new_zeros((batch if with_gradient else 0, width))
    grad_prototypes = weight.new_zeros((prototypes.shape[0] if with_prototype_gradient else 0, width))
    with torch.autocast(features.device.type, enabled=False):
        blocks = LogitBlocks(prototypes, scale, min(chunk, batch))
        for start in range(0, batch, chunk):
            rows = slice(start, start + chunk)
            h, label, w = features[rows], labels[rows], weight[rows, None]
            logits = blocks(h)
            if valid is not None:
                logits.masked_fill_(~valid, -torch.inf)
            _, nll = softmax_nll(logits, label, h, prototypes, scale)
            total += (nll * w[:, 0]).sum()
            if with_accuracy:
                largest = logits.amax(1, keepdim=True)
                correct += ((logits.gather(1, label[:, None]) >= largest) * w).sum()
            if not (with_gradient or with_prototype_gradient):
                continue
            logits.scatter_(1, label[:, None], torch.expm1(-nll)[:, None])  # p - onehot, the label's entry without cancellation
            residual = blocks.rounded(logits)
            if with_gradient:
                direction = (residual @ prototypes).to(weight.dtype).mul_(w)
                grad_features[rows] = direction * scale
                grad_scale += (direction * h).sum()
            if with_prototype_gradient:
                grad_prototypes += residual.T @ (h * (w * scale)).to(features.dtype)
    return total, correct, grad_features, grad_prototypes, grad_scale


@label_nll.register_fake
def _fake(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    chunk: int,
    with_gradient: bool,
    with_prototype_gradient: bool,
    with_accuracy: bool,
) -> Result:
    width = features.shape[1]
    return (
        weight.new_empty(()),
        weight.new_empty(()),
        weight.new_empty((features.shape[0] if with_gradient else 0, width)),
        weight.new_empty((prototypes.shape[0] if with_prototype_gradient else 0, width)),
        weight.new_empty(()),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[2:])


def _backward(ctx, grad, *others):  # type: ignore[no-untyped-def]
    if any(other is not None for other in others):
        raise NotImplementedError("prototype_cross_entropy cannot be differentiated twice: its gradient is a constant")
    features, prototypes, scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        (features * grad).to(ctx.dtypes[0]) if needs[0] else None,
        (prototypes * grad).to(ctx.dtypes[1]) if needs[1] else None,
        None,
        None,
        scale * grad if needs[4] else None,
        None,
        None,
        None,
        None,
        None,
    )


label_nll.register_autograd(_backward, setup_context=_setup)
