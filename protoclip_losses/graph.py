"""Keeping inputs in the autograd graph without computing with them."""

from typing import Any

import torch
from torch import Tensor


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
