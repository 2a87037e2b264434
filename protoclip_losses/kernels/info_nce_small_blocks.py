"""InfoNCE in blocks that stay in a CPU's cache, where values can be read for free.

Two passes over blocks of rows: the first computes R, C and p of :mod:`.info_nce`, the second the gradients. The columns need no
exponential of their own: exp(x_ij) = p_ij exp(R_i), so C is a matrix-vector product and G a rank-one rescaling of p. The p_ij are
cached between the passes where they fit the budget, and computed again otherwise. Where normalisers lie too far apart for that
product, columns get their own exponentials.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import sum_dtype
from ..distributed import RankRows
from .blocks import LogitBlocks, label_is_first, softmax_nll
from .repeats import repeated

# exp(R_i) p_ij stays exact to float32 while no column's normaliser lies further than this below the largest row normaliser:
# p_ij is flushed to zero below exp(-87), and exp(60 - 87) of a column's mass is less than its last bit.
REACH = 60.0


def pair_nll_in_small_blocks(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    chunk: int,
    cache_logits: bool,
    with_gradient: bool,
    with_accuracy: bool,
    ids: Tensor | None,
    ranks: RankRows,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`protoclip_losses.kernels.info_nce.pair_nll` returns."""
    pass_over = _Pass(image, text, scale, chunk, ids, ranks)
    cached = scale.new_empty((image.shape[0], pass_over.texts.shape[0])) if cache_logits and with_gradient else None
    row_nll, own_others = pass_over.normalisers(cached, with_accuracy)
    own = pass_over.own
    others, of_all = ranks.logsumexp(own_others, torch.stack([pass_over.pair, pass_over.pair + row_nll], 1))
    pair, rows = of_all.unbind(1)
    column_nll = F.softplus(others - pair, threshold=40)  # beyond it float64 sees no more
    columns = pair + column_nll
    rescaled = bool(columns.min() > rows.max() - REACH)
    if not rescaled:
        column_nll = F.softplus(pass_over.exact_others() - pair, threshold=40)
        columns = pair + column_nll
    total = (row_nll.sum() + column_nll[own].sum()) / 2
    if not with_gradient:
        empty = scale.new_zeros((0, image.shape[1]))
        return total, pass_over.correct, empty, empty.clone(), scale.new_zeros(())
    return total, pass_over.correct, *pass_over.gradients(cached, row_nll, columns, column_nll, rescaled)


class _Pass:
    """The two passes over blocks of rows, and what they share."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, chunk: int, ids: Tensor | None, ranks: RankRows) -> None:
        texts, *of_ids = ranks.gather_each(text, *([] if ids is None else [ids]))
        self.image, self.texts, self.scale, self.chunk = image, texts, scale, min(chunk, image.shape[0])
        self.blocks = LogitBlocks(self.texts, scale, self.chunk)
        self.ranks, self.own = ranks, ranks.own
        self.labels = torch.arange(self.own.start, self.own.stop, device=image.device)
        self.pair = scale.new_empty(image.shape[0])
        self.correct = scale.new_zeros(())
        self.ids = of_ids[0] if of_ids else None

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """A block of logits, -inf where another pair has the same id."""
        logits = self.blocks(self.image[rows], out)
        if self.ids is not None:
            logits.masked_fill_(repeated(self.ids, self.own, rows), -torch.inf)
        return logits

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.image.shape[0], self.chunk):
            yield slice(start, start + self.chunk)

    def diagonal(self, block: Tensor, rows: slice) -> Tensor:
        """The entries of own pairs within a block of rows."""
        return block.diagonal(self.own.start + rows.start)

    def normalisers(self, cached: Tensor | None, with_accuracy: bool) -> tuple[Tensor, Tensor]:
        """-log p_ii of own rows, and log of a column's mass in them without its own pair. Fills ``cached`` with p, diagonal 0."""
        row_nll = torch.empty_like(self.pair)
        others = self.scale.new_full((self.texts.shape[0],), -torch.inf)
        for rows in self.slices():
            z = self.image[rows]
            p = self.logits(rows, None if cached is None else cached[rows])
            self.pair[rows] = self.diagonal(p, rows)
            if with_accuracy:
                self.correct += label_is_first(p, self.labels[rows]).sum()
            nll = softmax_nll(p, self.labels[rows], z, self.texts, self.scale)[1]
            self.diagonal(p, rows).zero_()
            # A probability near 1 has no digits left for its logarithm; the others' sum has.
            row_nll[rows] = torch.where(nll < 0.5, -torch.log1p(-p.sum(1).clamp(max=0.5)), nll)
            normaliser = self.pair[rows] + row_nll[rows]
            top = normaliser.max()
            others = torch.logaddexp(others, ((normaliser - top).exp_() @ p).log_() + top)
        return row_nll, others

    def exact_others(self) -> Tensor:
        """log of each column's mass in all rows without its own pair, by its own exponentials with a running maximum."""
        top = self.scale.new_full((self.texts.shape[0],), -torch.inf)
        mass = torch.zeros_like(top)
        for rows in self.slices():
            logits = self.logits(rows)
            self.diagonal(logits, rows).fill_(-torch.inf)
            higher = torch.maximum(top, logits.amax(0))
            base = higher.clamp(min=torch.finfo(higher.dtype).min)  # -inf less -inf would be NaN
            mass = mass * (top - base).exp() + logits.sub_(base).exp_().sum(0)
            top = higher
        return self.ranks.logsumexp(top + mass.log(), self.pair[:, None])[0]

    def gradients(
        self, cached: Tensor | None, row_nll: Tensor, columns_lse: Tensor, column_nll: Tensor, rescaled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of image, text and scale."""
        rows_lse = self.pair + row_nll
        diagonal = torch.expm1(-row_nll) + torch.expm1(-column_nll[self.own])  # p_ii + q_ii - 2 without cancellation
        base = rows_lse.max()
        right = (base - columns_lse).exp_()
        grad_image = self.scale.new_empty(self.image.shape)
        grad_texts = self.scale.new_zeros(self.texts.shape)
        grad_scale = self.scale.new_zeros((), dtype=sum_dtype(self.scale.device))
        buffer = self.scale.new_empty((self.chunk, self.texts.shape[0]))
        for rows in self.slices():
            z = self.image[rows]
            factor = buffer[: len(z)]
            if rescaled and cached is not None:
                p = cached[rows]
            else:
                p = self.logits(rows)
                if not rescaled:
                    torch.sub(p, columns_lse, out=factor).exp_()
                p.sub_(rows_lse[rows, None]).exp_()
            if rescaled:
                p.addcmul_(p, torch.outer((rows_lse[rows] - base).exp_(), right, out=factor))
            else:
                p.add_(factor)
            self.diagonal(p, rows).copy_(diagonal[rows])
            residual = self.blocks.rounded(p)
            direction = (residual @ self.texts).to(self.scale.dtype).mul_(0.5)
            grad_scale += (direction * z).sum()
            grad_image[rows] = direction * self.scale
            grad_texts += residual.T @ z
        return grad_image, self.ranks.sum_of_own(grad_texts).mul(self.scale / 2), grad_scale.to(self.scale.dtype)
