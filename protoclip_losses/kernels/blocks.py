"""Blocks of logits: their product, and the softmax in place. How large they are stands in :mod:`.sizes`."""

import torch
from torch import Tensor

from .._dtypes import may_read_values, sum_dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``x`` run: autocast's where it is on (it leaves float64 alone), else its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class BlockSums:
    """Sums over blocks, () in the dtype of ``like`` each. Those of several blocks are added in float64, but on MPS: in float32
    each block would cost a rounding."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add the entries of a block."""
        self.parts.setdefault(name, []).append(x.sum())

    def of(self, name: str) -> Tensor:
        """The sum; 0 of no blocks."""
        parts, dtype = self.parts.get(name, []), self.like.dtype
        if not parts:
            return self.like.new_zeros(())
        if len(parts) == 1:
            return parts[0].to(dtype)
        return torch.stack(parts).sum(dtype=sum_dtype(self.like.device)).to(dtype)


class LogitBlocks:
    """Logits ``s q K^T`` of blocks of queries against all keys, in buffers that are reused from block to block.

    The product is rounded to the dtype of its inputs; everything after it is in the accumulation dtype, that of ``scale``. With
    ``narrow`` the logits stay in the dtype of the product, scaled before they are rounded: half the memory traffic.
    """

    def __init__(self, keys: Tensor, scale: Tensor, rows: int, narrow: bool = False, logits: Tensor | None = None) -> None:
        self.keys, self.scale = keys, scale
        self.rounds = keys.dtype != scale.dtype and not narrow
        dtype = keys.dtype if narrow else scale.dtype
        self.logits = keys.new_empty((rows, keys.shape[0]), dtype=dtype) if logits is None else logits
        self.product = keys.new_empty((rows, keys.shape[0])) if self.rounds else self.logits

    def __call__(self, queries: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of these queries, in ``out`` or in the buffer that the next call overwrites."""
        logits = self.logits[: len(queries)] if out is None else out
        if not self.rounds:
            return torch.mm(queries * self.scale, self.keys.T, out=logits)
        product = torch.mm(queries, self.keys.T, out=self.product[: len(queries)])
        if may_read_values(queries):
            return logits.copy_(product).mul_(self.scale)
        return torch.mul(product, self.scale[None, None], out=logits)  # of two matrices, the wider dtype is that of the product

    def rounded(self, probabilities: Tensor) -> Tensor:
        """Probabilities in the dtype of the products."""
        return self.product[: len(probabilities)].copy_(probabilities) if self.rounds else probabilities


def softmax_nll(
    logits: Tensor, labels: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, with_accuracy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn logits (b, K) into probabilities in place.

    Returns:
        Each label's probability less 1 (b,); its ``-log`` (b,); and ``with_accuracy`` which rows have their largest logit at the
        label (b,), see :func:`label_is_first`.
    """
    if not may_read_values(logits):
        return _softmax_nll_by_maximum(logits, labels, scale, with_accuracy)
    is_first = label_is_first(logits, labels) if with_accuracy else None
    return *_softmax_nll_by_value(logits, labels, queries, keys, scale), is_first


def _softmax_nll_by_maximum(
    logits: Tensor, labels: Tensor, scale: Tensor, with_accuracy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without a decision: with the largest logit m and its probability p_m, ``-log p_a = m - x_a - log p_m``.

    Low precision may round p_m up to 1: there it comes from the sum of the others.
    """
    column = labels[:, None]
    own = logits.gather(1, column)
    top, winner = logits.max(1, keepdim=True)
    torch.softmax(logits, 1, out=logits)
    largest = logits.gather(1, winner)
    if logits.dtype == scale.dtype:
        nll = (top - own) - largest.log()
    else:
        others = logits.scatter_(1, winner, 0).sum(1, keepdim=True, dtype=scale.dtype)
        logits.scatter_(1, winner, largest)
        nll = (top.to(scale.dtype) - own) + torch.log1p(others / largest)
    return torch.expm1(-nll[:, 0]), nll[:, 0], (winner == column)[:, 0] if with_accuracy else None


def _softmax_nll_by_value(logits: Tensor, labels: Tensor, queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """By the label's own probability.

    Where it underflows, the loss comes from the largest probability and from the difference of the two logits, computed again
    from queries and keys. Where low precision rounds it up to 1, it comes from the other probabilities.
    """
    torch.softmax(logits, 1, out=logits)
    own = _entries(logits, labels)
    probability = logits.take(own).to(scale.dtype)
    residual, nll = probability - 1, probability.log().neg_()
    if logits.dtype != scale.dtype and not float(probability.max()) < 0.5:
        _put(logits, own, torch.zeros_like(own, dtype=logits.dtype))
        others = -torch.mv(logits, torch.ones_like(logits[0])).to(scale.dtype)
        is_large = probability > 0.5
        residual, nll = others.where(is_large, residual), (-torch.log1p(others)).where(is_large, nll)
    smallest = 16 * torch.finfo(logits.dtype).tiny
    if probability.min().item() > smallest:
        return residual, nll
    largest, winners = logits.max(1)
    exact = queries.to(scale.dtype)
    first, second = ((exact * keys[x]).sum(1).to(keys.dtype).to(scale.dtype) for x in (winners, labels))  # rounded as the block
    return residual, nll.where(probability > smallest, (first - second) * scale - largest.to(scale.dtype).log())


def put_at_labels(logits: Tensor, labels: Tensor, values: Tensor) -> None:
    """Write values (b,) to the labels' entries of (b, K) logits."""
    values = values.to(logits.dtype)
    if may_read_values(logits):  # a CPU scatters bfloat16 by way of a copy of all logits in float32
        _put(logits, _entries(logits, labels), values)
    else:
        logits.scatter_(1, labels[:, None], values[:, None])


def _entries(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the labels' entries stand in (b, K) logits that are read as one row, (b,): to take and to put a few numbers there is
    cheaper than to index rows and columns."""
    return torch.arange(0, logits.numel(), logits.shape[1], device=labels.device).add_(labels)


def _put(logits: Tensor, entries: Tensor, values: Tensor) -> None:
    logits.view(-1).index_copy_(0, entries, values)  # put_ is faster by 1 us, and has no deterministic form


def label_is_first(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of (b, K) logits have their largest entry at the label, (b,) bool. A tie counts for the lowest column alone."""
    if not may_read_values(logits):
        return logits.argmax(1) == labels
    # On a CPU a maximum without its position is ten times faster; positions are needed only where the label is tied.
    own = _entries(logits, labels)
    values = logits.take(own)
    _put(logits, own, torch.full_like(values, -torch.inf))
    others = logits.amax(1)
    _put(logits, own, values)
    is_first, tied = values > others, values == others
    if bool(tied.any()):
        is_first[tied] = logits[tied].argmax(1) == labels[tied]
    return is_first
