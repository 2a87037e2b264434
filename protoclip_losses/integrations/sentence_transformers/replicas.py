"""Parameters that no DDP wraps: equal on all processes, with the gradient of the mean over them, as DDP has it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...distributed import Group, broadcast, sum_over_ranks, validate_on_all_ranks, world_size


class _MeanGradient(torch.autograd.Function):
    """The identity; gradients are averaged over ranks, all of them at once."""

    @staticmethod
    def forward(ctx: Any, group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        mean = sum_over_ranks(flat, ctx.group) / world_size(ctx.group)
        parts = torch.split(mean, [grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


@torch.no_grad()
def copy_from_first(module: nn.Module, group: Group | None) -> None:
    """Give every rank the first one's parameters and buffers, as DDP does when it is made."""
    if group is None:
        return
    tensors = module.state_dict()
    validate_on_all_ranks(lambda: None, group, lambda: {"the heads": [(name, x.shape, x.dtype) for name, x in tensors.items()]})
    for x in tensors.values():
        x.copy_(broadcast(x, group))


def call(module: nn.Module, group: Group | None, *inputs: Tensor) -> Any:
    """The output of a module whose parameters get the mean over ranks of their gradients."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if group is None or not parameters or not torch.is_grad_enabled():
        return module(*inputs)
    averaged: Any = _MeanGradient.apply(group, *parameters.values())  # type: ignore[no-untyped-call]
    return functional_call(module, dict(zip(parameters, averaged, strict=True)), inputs)
