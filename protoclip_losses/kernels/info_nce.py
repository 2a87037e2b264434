"""The InfoNCE kernel: image-to-text and text-to-image cross-entropy from the same blocks of logits.

With x_ij = s z^I_i.z^T_j, log normalisers R_i of the rows and C_j of the columns, and p_ij = exp(x_ij - R_i)::

    loss = sum_i (R_i + C_i) / 2 - x_ii
    G_ij = (p_ij + exp(x_ij - C_j)) / 2 - [i = j] = p_ij (1 + exp(R_i - C_j)) / 2 - [i = j]
    d loss / d z^I = s G z^T,      d loss / d z^T = s G^T z^I

Two passes over blocks of rows: three products in all while the logits fit the memory budget, four and memory linear in B beyond
it. :mod:`.info_nce_small_blocks` is for a CPU, :mod:`.info_nce_large_blocks` for an accelerator and for small batches.

Over ranks, each has the rows of its own images and the columns of all texts: R is local, C and the gradient of the texts are
sums over ranks. Ranks exchange the texts, a few numbers per column, and the texts' gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import may_read_values, without_autocast
from ..distributed import RankRows
from .autograd import recomputed_blocks, run
from .blocks import product_dtype
from .info_nce_large_blocks import COPIES, pair_nll_in_large_blocks
from .info_nce_small_blocks import pair_nll_in_small_blocks
from .repeats import repeated, shared_positives
from .sizes import RECOMPUTED, BlockLimit, can_be_kept, rows_per_block, sizes_of

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def pair_nll(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    chunk: int,
    cache_logits: bool,
    with_gradient: bool,
    with_accuracy: bool,
    ids: Tensor | None = None,
    ranks: RankRows | None = None,
) -> Result:
    """Sum over own pairs of the two directions' mean loss, how many images rank their text first, and gradients.

    Gradients are with respect to own image (b, d), own text (b, d) and scale (). Those of image and text are of the sum over
    the pairs of all ranks; that of the scale is a share: summed over ranks it is the gradient of that sum. What is not asked
    for is empty or zero. Pairs of equal ``ids`` (b,) are no negatives of each other.
    """
    with without_autocast(image.device.type):
        ranks = ranks or RankRows(None, [image.shape[0]])
        # Ranks of unequal rows would choose differently, and the two forms exchange different things.
        is_small = ranks.is_single and image.shape[0] ** 2 <= sizes_of(image.device).dense_logits and chunk >= image.shape[0]
        form = pair_nll_in_small_blocks if may_read_values(image) and not is_small else pair_nll_in_large_blocks
        return form(image, text, scale, chunk, cache_logits, with_gradient, with_accuracy, ids, ranks)


pair_nll_operator = torch.library.custom_op(
    "protoclip_losses::pair_nll",
    pair_nll,
    mutates_args=(),
    schema="(Tensor image, Tensor text, Tensor scale, SymInt chunk, bool cache_logits, bool with_gradient, bool with_accuracy, "
    "Tensor? ids) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@pair_nll_operator.register_fake
def _fake(image: Tensor, text: Tensor, scale: Tensor, *rest: Any) -> Result:
    *_, with_gradient, _, _ = rest
    gradients = [scale.new_empty((image.shape[0] if with_gradient else 0, image.shape[1])) for _ in range(2)]
    return scale.new_empty(()), scale.new_empty(()), gradients[0], gradients[1], scale.new_empty(())


def pair_nll_sum(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    limit: BlockLimit,
    *,
    with_accuracy: bool = False,
    ids: Tensor | None = None,
    repeats: str | None = None,
    ranks: RankRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over own pairs of the InfoNCE loss among all ranks' pairs, differentiable; how many images rank their text first."""
    image, text = in_product_dtype(image, text)
    ranks = ranks or RankRows(None, [image.shape[0]])
    wanted = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad or scale.requires_grad)
    chunk, cache_logits = _sizes((image.shape[0], ranks.total), image, scale, limit)
    masked = ids if repeats == "mask" else None
    inputs = image, text, scale, chunk, cache_logits, wanted, with_accuracy, masked
    if ranks.is_single:
        total, correct = run("info_nce", pair_nll, pair_nll_operator, *inputs)
    else:
        total, correct = _run_outside_of_graphs(*inputs, ranks)
    if ids is not None and repeats == "share":
        total = total + scale * shared_positives(image, text, ids, ranks).sum()
    return total, correct


def _sizes(shape: tuple[int, int], image: Tensor, scale: Tensor, limit: BlockLimit) -> tuple[int, bool]:
    """Rows of a block of logits, and whether the logits are kept between the passes."""
    rows, columns = shape
    if image.device.type == "cpu":
        chunk, kept, in_work = rows_per_block(columns, image.dtype, image.device, limit, copies=3), 1, 2
    else:
        in_work = int(image.dtype != scale.dtype)  # the product before it is scaled
        chunk, kept = rows_per_block(columns, scale.dtype, image.device, limit, copies=COPIES + in_work), COPIES
    return chunk, can_be_kept(shape, scale.dtype, image.device, limit, kept, in_work * min(chunk, rows))


def in_product_dtype(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both features in the dtype of their product."""
    dtype = product_dtype(image if image.dtype == text.dtype else image.to(torch.promote_types(image.dtype, text.dtype)))
    return image.to(dtype), text.to(dtype)


def pair_nll_rows(
    image: Tensor, text: Tensor, scale: Tensor, limit: BlockLimit, ids: Tensor | None = None, repeats: str | None = None
) -> Tensor:
    """Each pair's mean of the two directions, (B,), by a dense expression for each block of rows that backward runs again."""
    image, text = in_product_dtype(image, text)
    masked = ids if repeats == "mask" else None

    def rows(block: slice) -> Tensor:
        pairs = torch.arange(block.start, block.stop, device=image.device)
        with torch.autocast(image.device.type, enabled=False):
            of_images = (image[block] @ text.T).to(scale.dtype) * scale
            of_texts = (text[block] @ image.T).to(scale.dtype) * scale
        if masked is not None:
            same = repeated(masked, slice(0, len(masked)), block)
            of_images, of_texts = (x.masked_fill(same, -torch.inf) for x in (of_images, of_texts))
        return (F.cross_entropy(of_images, pairs, reduction="none") + F.cross_entropy(of_texts, pairs, reduction="none")) / 2

    chunk = rows_per_block(image.shape[0], scale.dtype, image.device, limit, copies=2 * RECOMPUTED)
    losses = recomputed_blocks(rows, image.shape[0], chunk)
    if ids is not None and repeats == "share":
        losses = losses + scale * shared_positives(image, text, ids, RankRows(None, [image.shape[0]]))
    return losses


# Collectives of a kernel have no place in a traced graph.
_run_outside_of_graphs: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    partial(run, "info_nce", pair_nll, None)
)
