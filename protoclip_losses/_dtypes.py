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


def is_transformed() -> bool:
    """Whether this runs under a transform of torch.func."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Whether this stands for the many tensors that vmap runs a function on: none of them has a value that can be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def without_transforms(x: Tensor) -> Tensor:
    """The tensor that transforms of torch.func have wrapped; of a batched one, those of all samples."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def may_read_values(*tensors: Tensor) -> bool:
    """Whether values can be read for free: an accelerator would be waited for, and graphs and vmap have none."""
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in tensors):
        return False
    return not (is_transformed() and any(is_batched(x) for x in tensors))


def assert_on_device(good: Tensor) -> None:
    """Raise RuntimeError if an entry is False: an accelerator raises when it gets there, and is not waited for."""
    torch._assert_async((without_transforms(good) if is_transformed() else good).all())
