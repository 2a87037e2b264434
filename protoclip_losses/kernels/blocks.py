"""Blocks of logits: how large they are, their product, and the softmax in place. Every size and budget stands here."""

import torch
from torch import Tensor

from .._dtypes import may_read_values as may_read_values  # as a name of this module, which tests replace

# Bytes of one block of logits. A block that is too small pays for reading the prototypes again, one that is too large falls
# out of the cache between the product and the softmax; 64 MB is what the library promises to stay within.
BLOCK_BYTES = 40 * 2**20
# Bytes of B x B logits that InfoNCE may keep between its two passes. Within it three products, beyond it four.
LOGITS_BUDGET = 512 * 2**20
# Logits up to which the dense expression is faster: a small step is paid in operators, and autograd runs its own in C++.
DENSE_LOGITS = 2**18


def rows_per_block(columns: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """Rows of a block of logits with ``columns`` columns: ``chunk_size`` if it is given, else what fits into BLOCK_BYTES."""
    if chunk_size is not None:
        return chunk_size
    item = {torch.float64: 8, torch.float16: 6}.get(dtype, 4)  # float16: logits in float32, and their product in float16
    return max(1, min(1024, BLOCK_BYTES // (item * max(1, columns))))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``x`` run: autocast's where it is on (it leaves float64 alone), else its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class LogitBlocks:
    """Logits ``s q K^T`` of blocks of queries against all keys, in buffers that are reused from block to block.

    The product is rounded to the dtype of its inputs; everything after it is in the accumulation dtype, that of ``scale``. With
    ``narrow`` the logits stay in the dtype of the product, scaled before they are rounded: half the memory traffic.
    """

    def __init__(self, keys: Tensor, scale: Tensor, rows: int, narrow: bool = False) -> None:
        self.keys, self.scale = keys, scale
        self.rounds = keys.dtype != scale.dtype and not narrow
        self.logits = keys.new_empty((rows, keys.shape[0]), dtype=keys.dtype if narrow else scale.dtype)
        self.product = keys.new_empty((rows, keys.shape[0])) if self.rounds else self.logits

    def __call__(self, queries: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of these queries, in ``out`` or in the buffer that the next call overwrites."""
        logits = self.logits[: len(queries)] if out is None else out
        if not self.rounds:
            return torch.mm(queries * self.scale, self.keys.T, out=logits)
        product = torch.mm(queries, self.keys.T, out=self.product[: len(queries)])
        return logits.copy_(product).mul_(self.scale)

    def rounded(self, probabilities: Tensor) -> Tensor:
        """Probabilities in the dtype of the products."""
        return self.product[: len(probabilities)].copy_(probabilities) if self.rounds else probabilities


def softmax_nll(logits: Tensor, labels: Tensor, queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits (b, K) into probabilities in place; return the labels' probabilities less 1, and their ``-log``, both (b,).

    Where a label's probability underflows, its loss comes from the largest probability and from the difference of the two
    logits, computed again from queries and keys. Where low precision rounds it up to 1, it comes from the other probabilities.
    """
    torch.softmax(logits, 1, out=logits)
    own = torch.arange(len(logits), device=logits.device), labels
    probability = logits[own].to(scale.dtype)
    residual, nll = probability - 1, -probability.log()
    may_read = may_read_values(logits)
    if logits.dtype != scale.dtype and not (may_read and float(probability.max()) < 0.5):
        logits[own] = 0
        others = -torch.mv(logits, torch.ones_like(logits[0])).to(scale.dtype)
        is_large = probability > 0.5
        residual, nll = others.where(is_large, residual), (-torch.log1p(others)).where(is_large, nll)
    smallest = 16 * torch.finfo(logits.dtype).tiny
    if may_read and float(probability.min()) > smallest:
        return residual, nll
    largest, winners = logits.max(1)
    exact = queries.to(scale.dtype)
    first, second = ((exact * keys[x]).sum(1).to(keys.dtype).to(scale.dtype) for x in (winners, labels))  # rounded as the block
    return residual, nll.where(probability > smallest, (first - second) * scale - largest.to(scale.dtype).log())


def label_is_first(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of (b, K) logits have their largest entry at the label, (b,) bool. A tie counts for the lowest column alone."""
    if not may_read_values(logits):
        return logits.argmax(1) == labels
    # A maximum without its position is ten times faster here; positions are needed only where the label is tied.
    own = torch.arange(len(logits), device=logits.device), labels
    values = logits[own]
    logits[own] = -torch.inf
    others = logits.amax(1)
    logits[own] = values
    is_first, tied = values > others, values == others
    if bool(tied.any()):
        is_first[tied] = logits[tied].argmax(1) == labels[tied]
    return is_first
