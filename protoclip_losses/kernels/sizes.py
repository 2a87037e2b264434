"""How large the blocks of logits are: every size and budget of the package, by device, in one table.

On a CPU a block has to stay in the cache between its product and its softmax. On an accelerator each operator of a block costs a
launch, some 5 us, whatever the size of the block: there a block is as large as a budget of memory allows. No size depends on how
much memory is free: to ask is to wait for the device.
"""

from dataclasses import dataclass

import torch

from .. import _checks as check

MIB = 2**20
UNBOUNDED = 2**62


@dataclass(frozen=True)
class DeviceSizes:
    """The sizes for one type of device.

    Attributes:
        block_bytes: of one block of logits.
        block_rows: of one block.
        memory_budget: bytes of all logits that a call holds at once, unless it is given one. InfoNCE keeps its logits between its
            two passes where they fit, and needs three products then, not four.
        dense_logits: up to which the dense expression of a prototype term is faster than its kernel, and InfoNCE is in the form
            of few operators.
        copied_rows: of features, that K-means and the sums over clusters copy to another dtype at a time.
        compared_rows: of features, whose distances from several centroids K-means compares at a time.
    """

    block_bytes: int
    block_rows: int
    memory_budget: int
    dense_logits: int
    copied_rows: int
    compared_rows: int


# CPU, measured: too small a block pays for reading the prototypes again, too large a one falls out of the cache; the library also
# promises to stay within 64 MB. A small step is paid in operators, and autograd runs its own in C++.
# Accelerators, counted: a term's kernel is some 10 operators more than its dense expression, forward and backward together, which
# reads or writes each logit 7 times more. At 3 TB/s and 5 us a launch the two are even at some 5 million logits.
SIZES = {
    "cpu": DeviceSizes(
        block_bytes=40 * MIB,
        block_rows=1024,
        memory_budget=(512 + 2 * 40) * MIB,
        dense_logits=2**18,
        copied_rows=2**14,
        compared_rows=256,
    ),
    "accelerator": DeviceSizes(
        block_bytes=UNBOUNDED,
        block_rows=UNBOUNDED,
        memory_budget=1024 * MIB,
        dense_logits=2**22,
        copied_rows=UNBOUNDED,
        compared_rows=UNBOUNDED,
    ),
}

COPIES = 4  # of a block's rows that are held together, in up to float64
RECOMPUTED = 3  # copies of a block's logits that autograd holds while it computes them again and goes back through them


class BlockLimit:
    """What the caller of a loss says of its blocks: their rows, or the bytes of all logits held at once. Neither: the table.

    Args:
        chunk_size: rows of a block.
        memory_budget: bytes.

    Raises:
        TypeError: no whole numbers.
        ValueError: both, or one below 1.
    """

    def __init__(self, chunk_size: int | None = None, memory_budget: int | None = None) -> None:
        if chunk_size is not None and memory_budget is not None:
            given = f"{chunk_size} rows and {memory_budget} bytes"
            raise ValueError(f"chunk_size and memory_budget must not both be given, each says how large blocks are, got {given}")
        if chunk_size is not None:
            check.at_least("chunk_size", chunk_size, 1)
        if memory_budget is not None:
            check.at_least("memory_budget", memory_budget, 1)
        self.chunk_size, self.memory_budget = chunk_size, memory_budget

    def bytes_on(self, device: torch.device) -> int:
        """Bytes of all logits held at once."""
        return sizes_of(device).memory_budget if self.memory_budget is None else self.memory_budget


def sizes_of(device: torch.device) -> DeviceSizes:
    """The row of the table for a device."""
    return SIZES["cpu" if device.type == "cpu" else "accelerator"]


def bytes_per_logit(dtype: torch.dtype) -> int:
    """Of a block whose product is in this dtype: float16 is a product in float16 and logits in float32."""
    return {torch.float64: 8, torch.float16: 6}.get(dtype, 4)


def rows_per_block(
    columns: int, dtype: torch.dtype, device: torch.device, limit: BlockLimit | None = None, copies: int = 1
) -> int:
    """Rows of a block of logits with ``columns`` columns, of which ``copies`` are held at once."""
    limit = limit or BlockLimit()
    if limit.chunk_size is not None:
        return limit.chunk_size
    sizes, row = sizes_of(device), bytes_per_logit(dtype) * max(1, columns)
    return max(1, min(sizes.block_rows, sizes.block_bytes // row, limit.bytes_on(device) // (copies * row)))


def rows_per_copy(width: int, device: torch.device) -> int:
    """Rows of features (N, width) that are copied to another dtype at a time."""
    return _rows_of_features(sizes_of(device).copied_rows, width, device)


def rows_per_comparison(count: int, width: int, device: torch.device) -> int:
    """Rows (N, width) that are compared with ``count`` centroids of their own each at a time."""
    return _rows_of_features(sizes_of(device).compared_rows, count * width, device)


def _rows_of_features(most: int, width: int, device: torch.device) -> int:
    return max(1, min(most, sizes_of(device).memory_budget // (COPIES * 8 * max(1, width))))


def can_be_dense(logits: int, dtype: torch.dtype, device: torch.device, limit: BlockLimit) -> bool:
    """Whether the dense expression is faster for this many logits and within the budget."""
    if limit.chunk_size is not None or logits > sizes_of(device).dense_logits:
        return False
    return limit.memory_budget is None or RECOMPUTED * bytes_per_logit(dtype) * logits <= limit.memory_budget


def can_be_kept(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, limit: BlockLimit, copies: int, working_rows: int
) -> bool:
    """Whether ``copies`` of all logits fit the budget, with so many rows of them in work."""
    rows, columns = shape
    return columns * bytes_per_logit(dtype) * (copies * rows + working_rows) <= limit.bytes_on(device)
