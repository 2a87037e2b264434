"""What both kernels do with one block of logits: how large it is, its product, and the softmax in its place."""

import torch
from torch import Tensor

# Bytes of one block of logits. A block that is too small pays for reading the prototypes again, one that is too large falls
# out of the cache between the product and the softmax; 64 MB is what the library promises to stay within, with its copies.
BLOCK_BYTES = 40 * 2**20
LOW_PRECISION_BLOCK_BYTES = 16 * 2**20  # float32 logits; their low-precision copy is half as large again


def rows_per_block(columns: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """Rows of a block of logits with ``columns`` columns: what the caller asked for, or what fits."""
    if chunk_size is not None:
        return chunk_size
    low = dtype in (torch.float16, torch.bfloat16)
    item = 8 if dtype == torch.float64 else 4
    return max(1, min(1024, (LOW_PRECISION_BLOCK_BYTES if low else BLOCK_BYTES) // (item * max(1, columns))))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``x`` run: autocast's where it is on (it leaves float64 alone), else its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class LogitBlocks:
    """Logits ``s q K^T`` of blocks of queries against all keys, in buffers that are used again from block to block.

    The product is rounded to the dtype of its inputs; everything after it is in the accumulation dtype, that of ``scale``.
    """

    def __init__(self, keys: Tensor, scale: Tensor, rows: int) -> None:
        self.keys, self.scale = keys, scale
        self.low = keys.dtype != scale.dtype
        self.logits = keys.new_empty((rows, keys.shape[0]), dtype=scale.dtype)
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
    """Turn logits (b, K) into probabilities in place; return those of the labels and their ``-log``, all (b, 1).

    Where a label's probability underflows, its loss is taken from the largest probability instead, and from the difference of
    the two logits, found anew from queries and keys.
    """
    torch.softmax(logits, 1, out=logits)
    probability = logits.gather(1, labels)
    smallest = 16 * torch.finfo(logits.dtype).tiny
    # On an accelerator asking whether any underflows would wait for the device.
    if logits.device.type == "cpu" and float(probability.min()) > smallest:
        return probability, probability.log().neg_()
    largest, winners = logits.max(1, keepdim=True)
    wide = queries.to(scale.dtype)
    first, own = (
        (wide * keys[x[:, 0]]).sum(1, keepdim=True).to(keys.dtype) for x in (winners, labels)
    )  # as rounded as the block
    difference = (first.to(scale.dtype) - own) * scale
    return probability, torch.where(probability > smallest, -probability.log(), difference - largest.log())
