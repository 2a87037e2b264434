"""The kernel of the sigmoid loss: each pair of an image and a text is one binary decision, block by block.

With u_ij = s x_i.y_j + b, and v_ij = -u_ij on the diagonal and u_ij elsewhere::

    loss = sum_ij softplus(v_ij)
    G_ij = sigmoid(v_ij), on the diagonal -sigmoid(v_ij)
    d loss / d x = s G y,   d loss / d y = s G^T x,   d loss / d s = sum_ij G_ij x_i.y_j,   d loss / d b = sum_ij G_ij

One pass over blocks of rows gives the loss and its gradients: three products, no logits are kept, and memory is linear in B. No
softmax couples the rows, so over ranks each has the rows of its own images; ranks exchange the texts and the texts' gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import without_autocast
from ..distributed import RankRows
from .autograd import recomputed_blocks, run
from .blocks import BlockSums, LogitBlocks, label_is_first
from .info_nce import in_product_dtype
from .sizes import RECOMPUTED, BlockLimit, can_be_dense, rows_per_block

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
BUFFERS = 2  # blocks that are in use at once: logits and residuals
THRESHOLD = 40  # beyond it softplus(x) is x, also in float64


def sigmoid_pairs(
    image: Tensor,
    text: Tensor,
    affine: Tensor,
    chunk: int,
    with_gradient: bool,
    with_accuracy: bool,
    ranks: RankRows | None = None,
) -> Result:
    """Sum of own images' losses with all texts, how many of them rank their own text first, and gradients.

    Gradients are with respect to own image (b, d), own text (b, d), and scale and bias, (2,) together in ``affine``. That of the
    texts is of the sum over all ranks' images; that of ``affine`` is a share, which is to be summed over ranks. What is not
    asked for is empty or zero.
    """
    with without_autocast(image.device.type):
        ranks = ranks or RankRows(None, [image.shape[0]])
        texts, own, (scale, bias) = ranks.gather(text), ranks.own, affine.unbind()
        rows, columns = image.shape[0], texts.shape[0]
        logit_blocks, sums = LogitBlocks(texts, scale, min(chunk, rows)), BlockSums(scale)
        buffer = scale.new_empty((min(chunk, rows) if with_gradient else 0, columns))
        grad_image = scale.new_empty((rows if with_gradient else 0, image.shape[1]))
        grad_texts = scale.new_zeros((columns if with_gradient else 0, image.shape[1]))
        for start in range(0, rows, chunk):
            block = slice(start, min(start + chunk, rows))
            x = image[block]
            logits = logit_blocks(x).add_(bias)
            first = own.start + start
            if with_accuracy:
                labels = torch.arange(first, first + len(x), device=image.device)
                sums.add("correct", label_is_first(logits, labels))
            logits.diagonal(first).neg_()
            residual = torch.sigmoid(logits, out=buffer[: len(x)]) if with_gradient else None
            sums.add("loss", F.softplus(logits, threshold=THRESHOLD, out=logits))  # type: ignore[call-arg]
            if residual is not None:
                residual.diagonal(first).neg_()
                sums.add("bias", residual)
                residual = logit_blocks.rounded(residual)
                direction = torch.mm(residual, texts).to(scale.dtype)
                sums.add("scale", direction * x)
                torch.mul(direction, scale, out=grad_image[block])
                if residual.dtype == scale.dtype:
                    grad_texts.addmm_(residual.T, x)
                else:
                    grad_texts += torch.mm(residual.T, x)
        grad_affine = torch.stack([sums.of("scale"), sums.of("bias")])
        if with_gradient:
            grad_texts = ranks.sum_of_own(grad_texts).mul(scale)
        return sums.of("loss"), sums.of("correct"), grad_image, grad_texts, grad_affine


sigmoid_pairs_operator = torch.library.custom_op(
    "protoclip_losses::sigmoid_pairs",
    sigmoid_pairs,
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor affine, SymInt chunk, bool with_gradient, bool with_accuracy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@sigmoid_pairs_operator.register_fake
def _fake(image: Tensor, text: Tensor, affine: Tensor, *rest: Any) -> Result:
    _, with_gradient, _ = rest
    gradients = [affine.new_empty((image.shape[0] if with_gradient else 0, image.shape[1])) for _ in range(2)]
    return affine.new_empty(()), affine.new_empty(()), gradients[0], gradients[1], affine.new_empty((2,))


def sigmoid_pair_sum(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    limit: BlockLimit,
    *,
    with_accuracy: bool = False,
    ranks: RankRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over own images and all ranks' texts of the loss, differentiable; how many own images rank their text first."""
    image, text = in_product_dtype(image, text)
    ranks = ranks or RankRows(None, [image.shape[0]])
    is_small = ranks.is_single and can_be_dense(image.shape[0] ** 2, scale.dtype, image.device, limit)
    if is_small and image.dtype == scale.dtype:  # autograd would round in between in low precision
        return _dense(image, text, scale, bias, with_accuracy)
    affine = torch.stack([scale, bias])
    wanted = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad or affine.requires_grad)
    buffers = BUFFERS + int(image.dtype != scale.dtype)  # the product, before and after
    chunk = rows_per_block(buffers * ranks.total, scale.dtype, image.device, limit)
    inputs = image, text, affine, chunk, wanted, with_accuracy
    if ranks.is_single:
        return run("sigmoid_pair_loss", sigmoid_pairs, sigmoid_pairs_operator, *inputs)
    return _run_outside_of_graphs(*inputs, ranks)


def sigmoid_pair_rows(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, limit: BlockLimit) -> Tensor:
    """Each image's loss with all texts, (B,), by a dense expression for each block of rows that backward runs again."""
    image, text = in_product_dtype(image, text)

    def rows(block: slice) -> Tensor:
        pairs = torch.arange(block.start, block.stop, device=image.device)[:, None]
        with torch.autocast(image.device.type, enabled=False):
            logits = (image[block] @ text.T).to(scale.dtype) * scale + bias
        own = pairs == torch.arange(text.shape[0], device=image.device)
        return F.softplus(logits.where(~own, -logits), threshold=THRESHOLD).sum(1)

    chunk = rows_per_block(RECOMPUTED * image.shape[0], scale.dtype, image.device, limit)
    return recomputed_blocks(rows, image.shape[0], chunk)


def _dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, with_accuracy: bool) -> tuple[Tensor, Tensor]:
    """What :func:`sigmoid_pair_sum` returns, by the dense expression: faster for few logits."""
    with torch.autocast(image.device.type, enabled=False):
        logits = (image * scale) @ text.T + bias
    correct = scale.new_zeros(())
    if with_accuracy:
        labels = torch.arange(image.shape[0], device=image.device)
        correct = label_is_first(logits.detach().clone(), labels).sum().to(scale.dtype)
    sign = 1 - 2 * torch.eye(image.shape[0], dtype=scale.dtype, device=image.device)
    return F.softplus(logits * sign, threshold=THRESHOLD).sum(), correct


# Collectives of a kernel have no place in a traced graph.
_run_outside_of_graphs: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    partial(run, "sigmoid_pair_loss", sigmoid_pairs, None)
)
