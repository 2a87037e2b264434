"""How a kernel that computes its gradients together with its value takes part in autograd and in torch.compile."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Precomputed(torch.autograd.Function):
    """``(total, correct)`` of a kernel that returns them with the gradients of three inputs, its first three.

    The gradients are constants by the time backward asks for them: it only multiplies them by the incoming one.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Sequence[Tensor]], *inputs: Any) -> tuple[Tensor, Tensor]:
        total, correct, *gradients = kernel(*inputs)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs[:3]]
        ctx.others = len(inputs) - 3
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        gradients = [(x * grad).to(dtype) if needs else None for x, dtype, needs in needed]
        return None, *gradients, *[None] * ctx.others


def run(kernel: Any, operator: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run a kernel under autograd: as it is in eager mode, and as an opaque operator in a traced graph."""
    chosen = operator if torch.compiler.is_compiling() else kernel
    result: tuple[Tensor, Tensor] = Precomputed.apply(chosen, *inputs)  # type: ignore[no-untyped-call]
    return result
