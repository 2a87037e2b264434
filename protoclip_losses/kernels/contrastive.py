"""The InfoNCE kernel: image-to-text and text-to-image cross-entropy from the same blocks of logits.

With x_ij = s z^I_i.z^T_j, row and column normalisers R_i, C_j and G_ij = (exp(x_ij - R_i) + exp(x_ij - C_j)) / 2 - [i = j]::

    loss = sum_i (R_i + C_i) / 2 - x_ii,      d loss / d z^I = s G z^T,      d loss / d z^T = s G^T z^I

Two passes over blocks of rows: the first finds the normalisers, the second the gradients. Logits are kept between the two
while they fit a stated budget (three products in all) and are computed again beyond it (four products, memory linear in B).
"""

import torch
from torch import Tensor

from .blocks import scaled_product

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "protoclip_losses::pair_nll",
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor scale, int chunk, bool keep_logits, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def pair_nll(image: Tensor, text: Tensor, scale: Tensor, chunk: int, keep_logits: bool, with_gradient: bool) -> Result:
    """Sum over pairs of the two directions' mean loss, rows and columns whose own pair has the largest logit, gradients."""
    batch = image.shape[0]
    row_lse, column_mass = scale.new_empty(batch), scale.new_zeros(batch)
    column_top = scale.new_full((batch,), -torch.inf)
    pair = scale.new_empty(batch)
    row_top = scale.new_empty(batch)
    kept: list[Tensor] = []
    with torch.autocast(image.device.type, enabled=False):
        for start in range(0, batch, chunk):
            rows = slice(start, start + chunk)
            logits = scaled_product(image[rows], text, scale)
            pair[rows] = logits.diagonal(start)
            row_top[rows] = logits.amax(1)
            row_lse[rows] = (logits - row_top[rows, None]).exp_().sum(1).log_()
            top = torch.maximum(column_top, logits.amax(0))
            column_mass.mul_((column_top - top).exp_()).add_((logits - top).exp_().sum(0))
            column_top = top
            if keep_logits and with_gradient:
                kept.append(logits)
        column_lse = column_mass.log_()
        total = ((row_lse + (row_top - pair)).sum() + (column_lse + (column_top - pair)).sum()) / 2
        correct_rows, correct_columns = (pair >= row_top).sum().to(scale.dtype), (pair >= column_top).sum().to(scale.dtype)
        grad_scale = scale.new_zeros(())
        if not with_gradient:
            empty = scale.new_zeros((0, image.shape[1]))
            return total, correct_rows, correct_columns, empty, empty.clone(), grad_scale
        grad_image = scale.new_empty(image.shape)
        grad_text = scale.new_zeros(text.shape)
        for block, start in enumerate(range(0, batch, chunk)):
            rows = slice(start, start + chunk)
            logits = kept[block] if kept else scaled_product(image[rows], text, scale)
            residual = (logits - row_top[rows, None]).sub_(row_lse[rows, None]).exp_()
            residual += logits.sub_(column_top).sub_(column_lse).exp_()
            residual.mul_(0.5).diagonal(start).sub_(1)
            low = residual.to(image.dtype)
            direction = (low @ text).to(scale.dtype)
            grad_scale += (direction * image[rows]).sum()
            grad_image[rows] = direction * scale
            grad_text += low.T @ image[rows]
    return total, correct_rows, correct_columns, grad_image, grad_text * scale, grad_scale


@pair_nll.register_fake
def _fake(image: Tensor, text: Tensor, scale: Tensor, chunk: int, keep_logits: bool, with_gradient: bool) -> Result:
    rows = image.shape[0] if with_gradient else 0
    gradients = [scale.new_empty((rows, image.shape[1])) for _ in range(2)]
    return scale.new_empty(()), scale.new_empty(()), scale.new_empty(()), gradients[0], gradients[1], scale.new_empty(())


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[3:])


def _backward(ctx, grad, *others):  # type: ignore[no-untyped-def]
    if any(other is not None for other in others):
        raise NotImplementedError("info_nce cannot be differentiated twice: its gradient is a constant")
    image, text, scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        (image * grad).to(ctx.dtypes[0]) if needs[0] else None,
        (text * grad).to(ctx.dtypes[1]) if needs[1] else None,
        scale * grad if needs[2] else None,
        None,
        None,
        None,
    )


pair_nll.register_autograd(_backward, setup_context=_setup)
