"""Which dtypes the library takes, in which it sums, where it may read values, and which settings must not change results."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
READABLE = {"cpu"}  # types of devices that no reading waits for
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
    if torch.compiler.is_compiling():
        return False
    for x in tensors:  # asked many times a step: a generator would cost as much as an operator
        if x.device.type not in READABLE:
            return False
    return not (is_transformed() and any(is_batched(x) for x in tensors))


def assert_on_device(good: Tensor) -> None:
    """Raise RuntimeError if an entry is False: an accelerator raises when it gets there, and is not waited for."""
    torch._assert_async((without_transforms(good) if is_transformed() else good).all())


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """No gradients, inference tensors, autocast or TensorFloat-32 in here, whatever the caller has set.

    For what is computed once and kept: it must not depend on where in a training script that is.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_any_autocast())
        stack.enter_context(full_precision())
        yield


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """No autocast on a type of device in here. To switch it off takes 8 us, also where it is off."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def without_any_autocast() -> Iterator[None]:
    """:func:`without_autocast` for every type of device."""
    with ExitStack() as stack:
        for kind in filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")):
            stack.enter_context(without_autocast(kind))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are rounded to float32 in here, not to TensorFloat-32 or bfloat16."""
    since_torch_2_9: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [x for x in since_torch_2_9 if hasattr(x, "fp32_precision")]
    before = [x.fp32_precision for x in backends] if backends else [torch.get_float32_matmul_precision()]
    is_full = set(before) <= {"ieee", "none", "highest"}

    def change(values: list[str]) -> None:
        for backend, value in zip(backends, values, strict=False):
            backend.fp32_precision = value
        if not backends:
            torch.set_float32_matmul_precision(values[0])

    if not is_full:
        change(["ieee", "ieee"] if backends else ["highest"])
    try:
        yield
    finally:
        if not is_full:
            change(before)
