"""InfoNCE in few operators a block: on an accelerator, where each is a launch, and for the few logits of a small batch.

No decision depends on a value, but where one can be read for free.

With the other pairs' mass in row i, exp(A_i), and in column j, exp(B_j), and the softmax P of the rows and Q of the columns
without the diagonal::

    a_i = sigmoid(A_i - x_ii),      loss = sum_i (softplus(A_i - x_ii) + softplus(B_i - x_ii)) / 2
    b_j = sigmoid(B_j - x_jj),      2 G_ij = a_i P_ij + b_j Q_ij off the diagonal, 2 G_ii = -a_i - b_i

so that nothing is lost where the loss is small. Q of one block of rows is that of the whole column but for a factor a column.
P and Q are kept between the two passes where they fit the budget, and computed again otherwise.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import may_read_values
from ..distributed import RankRows
from .blocks import BlockSums, LogitBlocks
from .repeats import repeated

COPIES = 2  # of a block that are held at once: P and Q


@dataclass
class _Block:
    """A block of rows: P and Q (b, N); own logits x_ii, A, and whether x_ii is the first of the largest (b,); its B (N,)."""

    rows: slice
    p: Tensor
    q: Tensor
    pair: Tensor
    row_mass: Tensor
    is_first: Tensor | None
    column_mass: Tensor


def pair_nll_in_large_blocks(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    chunk: int,
    keep: bool,
    with_gradient: bool,
    with_accuracy: bool,
    ids: Tensor | None,
    ranks: RankRows,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`protoclip_losses.kernels.info_nce.pair_nll` returns."""
    texts, *of_ids = ranks.gather_each(text, *([] if ids is None else [ids]))
    ids, own = of_ids[0] if of_ids else None, ranks.own
    slices = [slice(start, min(start + chunk, len(image))) for start in range(0, len(image), chunk)]
    held = len(image) if keep and with_gradient else min(chunk, len(image))
    memory = scale.new_empty((COPIES, held, len(texts)))
    logit_blocks = LogitBlocks(texts, scale, min(chunk, len(image)), logits=memory[0])
    sums = BlockSums(scale)

    def block(rows: slice, with_accuracy: bool = False) -> _Block:
        p, q = (x[rows] if held == len(image) else x[: rows.stop - rows.start] for x in memory)
        logits = logit_blocks(image[rows], out=q)
        lowest = torch.finfo(logits.dtype).min  # not -inf: a row without others is no NaN
        if ids is not None:
            logits.masked_fill_(repeated(ids, own, rows), lowest)
        diagonal = logits.diagonal(own.start + rows.start)
        pair = diagonal.clone()
        diagonal.fill_(lowest)
        (top, winner), (column_top, column_winner) = _largest(logits, 1), _largest(logits, 0)
        is_first = _is_first(pair, top[:, 0], winner, logits, own.start + rows.start) if with_accuracy else None
        torch.softmax(logits, 1, out=p)
        torch.softmax(logits, 0, out=q)
        row_mass = top - _largest_again(p, 1, winner).log_()
        column_mass = column_top - _largest_again(q, 0, column_winner).log_()
        return _Block(rows, p, q, pair, row_mass[:, 0], is_first, column_mass[0])

    first_pass = [block(rows, with_accuracy) for rows in slices]
    for part in first_pass:
        if part.is_first is not None:
            sums.add("correct", part.is_first)
    pair, row_mass = _joined([x.pair for x in first_pass]), _joined([x.row_mass for x in first_pass])
    column_mass = first_pass[0].column_mass
    for part in first_pass[1:]:
        column_mass = torch.logaddexp(column_mass, part.column_mass)
    column_mass, pairs = ranks.logsumexp(column_mass, pair[:, None])
    row_gap, column_gap = row_mass - pair, column_mass - pairs[:, 0]
    # Beyond the threshold float64 sees no more.
    total = (F.softplus(row_gap, threshold=40).sum() + F.softplus(column_gap[own], threshold=40).sum()) / 2
    if not with_gradient:
        empty = scale.new_zeros((0, image.shape[1]))
        return total, sums.of("correct"), empty, empty.clone(), scale.new_zeros(())
    of_rows, of_columns = torch.sigmoid(row_gap), torch.sigmoid(column_gap)
    of_pairs = torch.add(of_rows, of_columns[own]).neg_()
    half, grad_image, grad_texts = scale / 2, [], None
    is_whole = len(slices) == 1 and ranks.is_single
    for part in first_pass:
        rows = part.rows
        part = part if held == len(image) else block(rows)
        column_factor = of_columns if is_whole else of_columns * (part.column_mass - column_mass).exp_()
        residual = part.p.mul_(of_rows[rows, None]).addcmul_(part.q, column_factor)
        residual.diagonal(own.start + rows.start).copy_(of_pairs[rows])
        residual = logit_blocks.rounded(residual)
        direction = (residual @ texts).to(scale.dtype)
        sums.add("scale", direction * image[rows])
        grad_image.append(direction.mul_(half))
        of_block = (residual.T @ image[rows]).to(scale.dtype)
        grad_texts = of_block if grad_texts is None else grad_texts.add_(of_block)
    assert grad_texts is not None
    return total, sums.of("correct"), _joined(grad_image), ranks.sum_of_own(grad_texts).mul(half), sums.of("scale") / 2


def _largest(x: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """The largest entries, and where they are; None on a CPU, where a maximum without its position is ten times faster."""
    if may_read_values(x):
        return x.amax(dim, keepdim=True), None
    top, winner = x.max(dim, keepdim=True)
    return top, winner


def _largest_again(softmax: Tensor, dim: int, winner: Tensor | None) -> Tensor:
    """The softmax where its logits were the largest."""
    return softmax.amax(dim, keepdim=True) if winner is None else softmax.gather(dim, winner)


def _is_first(pair: Tensor, top: Tensor, winner: Tensor | None, others: Tensor, first: int) -> Tensor:
    """Which own logits (b,) are above all others of their row, or tied with none in a lower column."""
    is_above, is_tied = pair > top, pair == top
    if winner is None:
        if not bool(is_tied.any()):
            return is_above
        winner = others.argmax(1, keepdim=True)
    return is_above | is_tied & (torch.arange(first, first + len(pair), device=pair.device) < winner[:, 0])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
