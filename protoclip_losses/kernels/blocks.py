"""What both kernels do with one block of logits: how large it is, its product, and the softmax in its place."""

import torch
from torch import Tensor

# Bytes of one block of logits. A block that is too small pays for reading the prototypes again, one that is too large falls
# out of the cache between the product and the softmax; 64 MB is what the library promises to stay within.
BLOCK_BYTES = 40 * 2**20
# Bytes of B x B logits that InfoNCE may keep between its two passes. Within it three products, beyond it four.
LOGITS_BUDGET = 512 * 2**20
# Logits up to which the dense expression is faster: a small step is paid in operators, and autograd runs its own in C++.
DENSE_LOGITS = 2**18


def rows_per_block(columns: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """Rows of a block of logits with ``columns`` columns: what the caller asked for, or what fits."""
    if chunk_size is not None:
        return chunk_size
    item = {torch.float64: 8, torch.float16: 6}.get(dtype, 4)  # of float16: float32 logits, and their product beside them
    return max(1, min(1024, BLOCK_BYTES // (item * max(1, columns))))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``x`` run: autocast's where it is on (it leaves float64 alone), else its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class LogitBlocks:
    """Logits ``s q K^T`` of blocks of queries against all keys, in buffers that are used again from block to block.

    The product is rounded to the dtype of its inputs; everything after it is in the accumulation dtype, that of ``scale``. With
    ``narrow`` the logits stay in the dtype of the product, scaled before they are rounded: half the memory to go through.
    """

    def __init__(self, keys: Tensor, scale: Tensor, rows: int, narrow: bool = False) -> None:
        self.keys, self.scale = keys, scale
        self.low = keys.dtype != scale.dtype and not narrow
        self.logits = keys.new_empty((rows, keys.shape[0]), dtype=keys.dtype if narrow else scale.dtype)
        self.product = keys.new_empty((rows, keys.shape[0])) if self.low else self.logits

    def __call__(self, queries: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of these queries, in ``out`` or in the buffer that the next call writes to."""
        logits = self.logits[: len(queries)] if out is None else out
        if not self.low:
            return torch.mm(queries * self.scale, self.keys.T, out=logits)
        product = torch.mm(queries, self.keys.T, out=self.product[: len(queries)])
        return logits.copy_(product).mul_(self.scale)

    def rounded(self, probabilities: Tensor) -> Tensor:
        """Probabilities in the dtype of the products."""
        return self.product[: len(probabilities)].copy_(probabilities) if self.low else probabilities


def softmax_nll(logits: Tensor, labels: Tensor, queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits (b, K) into probabilities in place; return those of the labels less 1, and their ``-log``, all (b,).

    Where a label's probability underflows, its loss is taken from the largest probability instead, and from the difference of
    the two logits, found anew from queries and keys. Where low precision rounds it up to 1, from those of the others.
    """
    torch.softmax(logits, 1, out=logits)
    own = torch.arange(len(logits), device=logits.device), labels
    probability = logits[own].to(scale.dtype)
    lacking, nll = probability - 1, -probability.log()
    on_cpu = logits.device.type == "cpu"  # on an accelerator asking whether any row is special would wait for the device
    if logits.dtype != scale.dtype and not (on_cpu and float(probability.max()) < 0.5):
        logits[own] = 0
        others = -torch.mv(logits, torch.ones_like(logits[0])).to(scale.dtype)
        rounded = probability > 0.5
        lacking, nll = others.where(rounded, lacking), (-torch.log1p(others)).where(rounded, nll)
    smallest = 16 * torch.finfo(logits.dtype).tiny
    if on_cpu and float(probability.min()) > smallest:
        return lacking, nll
    largest, winners = logits.max(1)
    wide = queries.to(scale.dtype)
    first, second = ((wide * keys[x]).sum(1).to(keys.dtype).to(scale.dtype) for x in (winners, labels))  # rounded as the block
    return lacking, nll.where(probability > smallest, (first - second) * scale - largest.to(scale.dtype).log())
