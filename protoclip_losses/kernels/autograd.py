"""How the kernels take part in autograd and in torch.compile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Precomputed(torch.autograd.Function):
    """``(total, correct)`` of a kernel that returns them together with the gradients of its first three inputs.

    The gradients are constants by the time backward asks for them: it only multiplies them by the incoming one.
    """

    @staticmethod
    def forward(ctx: Any, name: str, kernel: Callable[..., Sequence[Tensor]], *inputs: Any) -> tuple[Tensor, Tensor]:
        total, correct, *gradients = kernel(*inputs)
        ctx.save_for_backward(*gradients, *(x for x in inputs[:3] if x.requires_grad))
        ctx.name, ctx.dtypes, ctx.num_others = name, [x.dtype for x in inputs[:3]], len(inputs) - 3
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients, inputs = saved[:3], saved[3:]
        wanted = zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:5], strict=True)
        results = [(g * grad).to(dtype) if needed else None for g, dtype, needed in wanted]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            results = [None if g is None else _NotTwice.apply(ctx.name, g, *inputs) for g in results]  # type: ignore[no-untyped-call]
        return None, None, *results, *[None] * ctx.num_others


class _NotTwice(torch.autograd.Function):
    """A gradient that raises when it is differentiated: as a constant it would silently drop terms."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(f"{ctx.name} cannot be differentiated twice: its gradient is computed as a constant")


def run(name: str, kernel: Any, operator: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel of a public function under autograd: directly in eager mode, as an opaque operator in a traced graph."""
    chosen = operator if torch.compiler.is_compiling() else kernel
    result: tuple[Tensor, Tensor] = Precomputed.apply(name, chosen, *inputs)  # type: ignore[no-untyped-call]
    return result


def recomputed_blocks(function: Callable[[slice], Tensor], rows: int, chunk: int) -> Tensor:
    """``function`` of each block of ``rows``, (rows,). Autograd keeps nothing of a block: backward computes it again."""
    parts = []
    for start in range(0, rows, chunk):
        block = slice(start, min(start + chunk, rows))
        parts.append(checkpoint(function, block, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)


@contextmanager
def constants() -> Iterator[None]:
    """For tensors that later training uses: without a gradient, and no inference tensors, which autograd could not save."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def in_backward() -> bool:
    """Whether autograd is running backward here: a forward that runs now is one that activation checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.module_tracker asks


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return grad, *zeros


def keep_in_graph(value: Tensor, *inputs: Any) -> Tensor:
    """``value``, with an exact zero gradient for every tensor among ``inputs`` that requires one.

    DDP with find_unused_parameters=False waits for a gradient of every parameter. Adding ``0 * x.sum()`` would give it one,
    and turn a NaN in x into a NaN in the loss.
    """
    wanted: list[Tensor] = []
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad and not any(x is other for other in wanted):
            wanted.append(x)
    if not wanted or not torch.is_grad_enabled():
        return value
    kept: Tensor = _KeepInGraph.apply(value, *wanted)  # type: ignore[no-untyped-call]
    return kept
