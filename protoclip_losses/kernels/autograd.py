"""How the kernels take part in autograd and in torch.compile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _Function(torch.autograd.Function):
    """A function that transforms of torch.func can differentiate, and vmap by running it on each sample."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        def sample(i: int) -> list[Any]:
            return [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)]

        results = [cls.apply(*sample(i)) for i in range(info.batch_size)]  # type: ignore[no-untyped-call]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


class Precomputed(_Function):
    """``(total, correct, *gradients)`` of a kernel that computes the gradients of its first three inputs with them.

    The gradients are constants by the time backward asks for them: it only multiplies them by the incoming one.
    """

    @staticmethod
    def forward(name: str, kernel: Callable[..., Sequence[Tensor]], *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(kernel(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, _, *rest = inputs
        ctx.save_for_backward(*output[2:], *(x for x in rest[:3] if x.requires_grad))
        ctx.name, ctx.dtypes, ctx.num_others = name, [x.dtype for x in rest[:3]], len(rest) - 3
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (5 + int(ctx.num_others))
        saved = ctx.saved_tensors
        gradients, inputs = saved[:3], saved[3:]
        wanted = zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:5], strict=True)
        results: list[Tensor | None] = [(g * grad).to(dtype) if needed else None for g, dtype, needed in wanted]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            results = [g if g is None else _once(ctx.name, g, *inputs) for g in results]
        return None, None, *results, *[None] * ctx.num_others


def _once(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    result: Tensor = _NotTwice.apply(name, gradient, *inputs)  # type: ignore[no-untyped-call]
    return result


class _NotTwice(_Function):
    """A gradient that raises when it is differentiated: as a constant it would silently drop terms."""

    @staticmethod
    def forward(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(f"{ctx.name} cannot be differentiated twice: its gradient is computed as a constant")


def run(name: str, kernel: Any, operator: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel of a public function under autograd: directly in eager mode, as an opaque operator in a traced graph."""
    chosen = operator if torch.compiler.is_compiling() else kernel
    if is_transformed() or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:3])):
        total, correct, *_ = Precomputed.apply(name, chosen, *inputs)  # type: ignore[no-untyped-call]
    else:  # the tracer of torch.compile does not know such a function without gradients
        total, correct, *_ = chosen(*inputs)
    return total, correct


def recomputed_blocks(function: Callable[[slice], Tensor], rows: int, chunk: int) -> Tensor:
    """``function`` of each block of ``rows``, (rows,). Autograd keeps nothing of a block: backward computes it again."""
    if is_transformed():  # torch.func knows no checkpoints
        return torch.cat([function(slice(start, min(start + chunk, rows))) for start in range(0, rows, chunk)])
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


def is_transformed() -> bool:
    """Whether this runs under a transform of torch.func."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class _KeepInGraph(_Function):
    @staticmethod
    def forward(value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs[1:]]

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
