"""How many rows a kernel works on at a time, and in which dtype its products run."""

import torch
from torch import Tensor

from .._checks import accumulation_dtype

# Elements of one block of logits. On CPU a block and its temporaries should stay in the cache between the product, the
# softmax and the second product; on an accelerator the block should be large enough to fill the device.
CPU_BLOCK = 1 << 21
ACCELERATOR_BLOCK = 1 << 23


def rows_per_block(columns: int, device: torch.device, chunk_size: int | None) -> int:
    """Rows of a block of logits with ``columns`` columns: what the caller asked for, or what fits."""
    if chunk_size is not None:
        return chunk_size
    elements = CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK
    return max(1, min(1024, elements // max(1, columns)))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``x`` run: autocast's where it is on (it leaves float64 alone), else its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def scaled_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``scale * a @ b.T`` in the accumulation dtype: a low-precision product is rounded to its dtype, all after it is not."""
    if a.dtype == accumulation_dtype(a.dtype):
        return (a * scale) @ b.T
    return (a @ b.T).to(scale.dtype).mul_(scale)
