"""How the kernels take part in autograd, in torch.func and in torch.compile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.checkpoint import checkpoint

from .._dtypes import is_transformed


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
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients, inputs = saved[:3], saved[3:]
        wanted = zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:5], strict=True)
        results = [(g * grad).to(dtype) if needed else None for g, dtype, needed in wanted]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            results = [None if g is None else _NotTwice.apply(ctx.name, g, *inputs) for g in results]  # type: ignore[no-untyped-call]
        return None, None, *results, *[None] * ctx.num_others


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_values: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like = [(x.shape, x.dtype, x.device) for x in tensors[num_values:]]
        return tuple(value.clone() for value in tensors[:num_values])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return None, *grads, *zeros


class _Transformed(torch.autograd.Function):
    """A function in the form that torch.func needs, which vmap runs on each sample.

    Without torch.func the form above is used: in this one torch reads the signature in each call, which takes a fifth of a small
    step, and torch.compile traces no ``jvp``.
    """

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        def sample(i: int) -> list[Any]:
            return [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)]

        results = [cls.apply(*sample(i)) for i in range(info.batch_size)]  # type: ignore[no-untyped-call]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


class _TransformedPrecomputed(_Transformed):
    """:class:`Precomputed` with the gradients among its outputs: what is saved must be an input or an output."""

    @staticmethod
    def forward(name: str, kernel: Callable[..., Sequence[Tensor]], *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(kernel(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, _, *rest = inputs
        ctx.save_for_backward(*output[2:], *(x for x in rest[:3] if x.requires_grad))
        ctx.name, ctx.dtypes, ctx.num_others = name, [x.dtype for x in rest[:3]], len(rest) - 3
        ctx.mark_non_differentiable(*output[1:])

    backward = staticmethod(Precomputed.backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _no_forward_mode(ctx.name)


class _NotTwice(_Transformed):
    """A gradient that raises when it is differentiated: as a constant it would silently drop terms."""

    @staticmethod
    def forward(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.name} cannot be differentiated twice: its gradient is computed as a constant, that of reduction='none' is not"
        )

    jvp = staticmethod(_TransformedPrecomputed.jvp)


@contextmanager
def constants() -> Iterator[None]:
    """For tensors that later training uses: without a gradient, and no inference tensors, which autograd could not save."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def in_backward() -> bool:
    """Whether autograd is running backward here: a forward that runs now is one that activation checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.module_tracker asks


class _TransformedKeepInGraph(_Transformed):
    @staticmethod
    def forward(num_values: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in tensors[:num_values])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs[1 + len(output) :]]
        ctx.num_values = len(output)

    backward = staticmethod(_KeepInGraph.backward)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.clone() for x in tangents[: ctx.num_values])


def run(name: str, kernel: Any, operator: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel of a public function under autograd: directly in eager mode, as an opaque operator in a traced graph."""
    chosen = operator if torch.compiler.is_compiling() else kernel
    if chosen is kernel and any(_tangent(x) is not None for x in inputs[:3]):
        raise _no_forward_mode(name)
    if is_transformed():
        total, correct, *_ = _TransformedPrecomputed.apply(name, chosen, *inputs)  # type: ignore[no-untyped-call]
    else:
        total, correct = Precomputed.apply(name, chosen, *inputs)  # type: ignore[no-untyped-call]
    return total, correct


def _tangent(x: Tensor) -> Tensor | None:
    tangent: Tensor | None = unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return tangent


def _no_forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has no derivative in forward mode (jvp, jacfwd, hessian), its reduction='none' has: use grad, jacrev or backward"
    )


def recomputed_blocks(function: Callable[[slice], Tensor], rows: int, chunk: int) -> Tensor:
    """``function`` of each block of ``rows``, (rows,). Autograd keeps nothing of a block: backward computes it again."""
    slices = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    if is_transformed():  # torch.func knows no checkpoints
        return torch.cat([function(block) for block in slices])
    return torch.cat([checkpoint(function, block, use_reentrant=False, preserve_rng_state=False) for block in slices])


def keep_in_graph(value: Tensor, *inputs: Any) -> Tensor:
    """``value``, with an exact zero gradient for every tensor among ``inputs`` that requires one.

    DDP with find_unused_parameters=False waits for a gradient of every parameter. Adding ``0 * x.sum()`` would give it one,
    and turn a NaN in x into a NaN in the loss.
    """
    return keep_all_in_graph([value], *inputs)[0]


def keep_all_in_graph(values: Sequence[Tensor], *inputs: Any) -> Sequence[Tensor]:
    """:func:`keep_in_graph` of several values together: however many of them are differentiated, an input gets one zero."""
    wanted: list[Tensor] = []
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad and not any(x is other for other in wanted):
            wanted.append(x)
    if not wanted or not torch.is_grad_enabled():
        return values
    function = _TransformedKeepInGraph if is_transformed() else _KeepInGraph
    kept: Sequence[Tensor] = function.apply(len(values), *values, *wanted)  # type: ignore[no-untyped-call]
    return kept
