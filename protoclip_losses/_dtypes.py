"""Which dtypes the library takes, in which it sums, and where it may read values."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exp and of sums within a batch: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over the rows of an episode: float64, but on MPS, which has none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def may_read_values(x: Tensor) -> bool:
    """Whether values can be read for free: an accelerator would be waited for, and graphs and vmap have none."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True
