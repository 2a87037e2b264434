"""The collectives of tensors: rows of all ranks, sums over ranks, and on which device a group can have them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup; not importable from builds without distributed
# Backends that have reduce_scatter_tensor: gloo was seen to in torch 2.4 to 2.14 (its list form it lacks in 2.4). mpi has none.
REDUCE_SCATTER = {"nccl", "gloo", "xccl"}
# Of one tensor for all ranks; torch 2.13 renames them. A build without distributed has neither.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
SMALL = 2**20  # bytes on each rank up to which the number of collectives counts, and not their size


def world_size(group: Group | None) -> int:
    """Number of processes in the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group | None) -> int:
    """This process's rank in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def backends(group: Group) -> dict[str, str]:
    """The group's backend for each type of device that it serves: ``cpu`` is missing in a group of nccl alone."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def collective_device(group: Group, *wanted: torch.device | None) -> torch.device:
    """Where a tensor must be for the group's collectives: the first of the ``wanted`` devices whose type the group serves.

    Without one, the CPU if it is served, else the group's own device, or the present one of a type that is.
    """
    served = list(backends(group))
    for device in (*wanted, torch.device("cpu"), group.bound_device_id):
        if device is not None and device.type in served:
            return cast(torch.device, device)
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())


def all_gather(x: Tensor, group: Group) -> list[Tensor]:
    """Tensors of equal shape, one per rank, in rank order."""
    x = x.contiguous()
    out = [torch.empty_like(x) for _ in range(world_size(group))]
    dist.all_gather(out, x, group=group)
    return out


class RankRows:
    """The rows of a batch or of an episode, and how they are spread over the processes of a group.

    Args:
        group: None for one process.
        sizes: the number of rows of each rank; unequal or zero is fine.
        digests: of each rank's samples, where they were exchanged.
    """

    def __init__(self, group: Group | None, sizes: Sequence[int], digests: Sequence[int] = ()) -> None:
        self.group, self.sizes, self.digests = group, sizes, digests

    @property
    def is_single(self) -> bool:
        """Whether there is one process, which communicates with no other."""
        return self.group is None

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return world_size(self.group)

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """This rank's rows among those of all ranks."""
        start = sum(self.sizes[: rank(self.group)])
        return slice(start, start + self.sizes[rank(self.group)])

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows, in rank order. No gradient."""
        return x if self.group is None else self._gathered(x)

    def gather_each(self, *tensors: Tensor) -> list[Tensor]:
        """:meth:`gather` of several tensors of the same rows, by one collective."""
        if self.group is None or len(tensors) == 1:
            return [self.gather(x) for x in tensors]
        rows = [x.detach().flatten(1) if x.dim() > 1 else x.detach()[:, None] for x in tensors]
        parts = [x.contiguous().view(torch.uint8) for x in rows]
        gathered = torch.split(self._gathered(torch.cat(parts, 1)), [x.shape[1] for x in parts], 1)
        return [y.contiguous().view(x.dtype).reshape(-1, *x.shape[1:]) for x, y in zip(tensors, gathered, strict=True)]

    def gather_with_gradient(self, x: Tensor) -> Tensor:
        """:meth:`gather`, differentiable: the gradients of all ranks flow back to the owner of a row."""
        return self.gather_each_with_gradient(x)[0]

    def gather_each_with_gradient(self, *tensors: Tensor) -> Sequence[Tensor]:
        """:meth:`gather_with_gradient` of several tensors of the same rows, by one collective in forward and one in backward."""
        if self.group is None:
            return tensors
        gathered: Sequence[Tensor] = _GatherRows.apply(self, *tensors)  # type: ignore[no-untyped-call]
        return gathered

    def _gathered(self, x: Tensor) -> Tensor:
        here, longest = self._padded(x.detach().to(collective_device(self.group, x.device))), max(self.sizes)
        rows = here.new_empty((self.world_size * longest, *x.shape[1:]))
        _all_gather(rows, here.contiguous(), group=self.group)
        return self._unpadded(rows).to(x.device)

    def _padded(self, x: Tensor) -> Tensor:
        """Rows of one rank, as many as the rank with most of them has."""
        missing = max(self.sizes) - len(x)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x

    def _unpadded(self, x: Tensor) -> Tensor:
        longest = max(self.sizes)
        if min(self.sizes) == longest:
            return x
        return torch.cat([part[:size] for part, size in zip(torch.split(x, longest), self.sizes, strict=True)])

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks."""
        return x if self.group is None else cast(Tensor, _reduced(x, "MAX", self.group))

    def sum(self, x: Tensor) -> Tensor:
        """The elementwise sum over ranks."""
        return sum_over_ranks(x, self.group)

    def sum_of_own(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks of (N, ...), of which no rank needs the others."""
        if self.group is None:
            return x
        device = collective_device(self.group, x.device)
        if backends(self.group)[device.type] not in REDUCE_SCATTER:
            return self.sum(x)[self.own]
        parts = x.detach().to(device)
        if min(self.sizes) < max(self.sizes):
            parts = torch.cat([self._padded(part) for part in torch.split(parts, list(self.sizes))])
        own = parts.new_empty((max(self.sizes), *x.shape[1:]))
        _reduce_scatter(own, parts.contiguous(), group=self.group)
        return own[: self.own.stop - self.own.start].to(x.device)

    def logsumexp(self, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """log of the elementwise sum of exponentials over ranks, -inf where every rank has it; and every rank's rows ``own``.

        By one collective while the ``x`` (N,) and rows (b, k) of all ranks are small, and by two, which do not gather, beyond it.
        """
        if self.group is None:
            return x, own
        numbers = self.world_size * (len(x) + max(self.sizes) * own.shape[1])
        if numbers * x.element_size() <= SMALL:
            once = RankRows(self.group, [1] * self.world_size)
            of_ranks, rows = once.gather_each(x[None], self._padded(own)[None])
            return of_ranks.logsumexp(0), self._unpadded(rows.flatten(0, 1))
        top = self.maximum(x)
        base = top.clamp(min=torch.finfo(x.dtype).min)  # -inf less -inf would be NaN
        rows = own.new_zeros((len(x), own.shape[1]))
        rows[self.own] = own
        sums = self.sum(torch.cat([(x - base).exp()[:, None], rows], 1))
        return sums[:, 0].log() + top, sums[:, 1:]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: RankRows, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.shapes, ctx.dtypes = ranks, [x.shape for x in tensors], [x.dtype for x in tensors]
        gathered = ranks.gather_each(*tensors)
        constants = (x for x, needed in zip(gathered, ctx.needs_input_grad[1:], strict=True) if not needed)
        ctx.mark_non_differentiable(*constants)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        own = ctx.ranks.sum_of_own(torch.cat([grads[i].flatten(1) for i in wanted], 1))
        parts = torch.split(own, [grads[i][:1].numel() for i in wanted], 1)
        results: list[Tensor | None] = [None] * len(grads)
        for i, part in zip(wanted, parts, strict=True):
            results[i] = part.reshape(ctx.shapes[i]).to(ctx.dtypes[i])
        return None, *results


def sum_over_ranks(x: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks, as a new tensor on the device of ``x``. No gradient."""
    return x if group is None else cast(Tensor, _reduced(x, "SUM", group))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.13 does not trace which devices a group has
def _reduced(x: Tensor, operation: str, group: Group | None) -> Tensor:
    result = x.detach().to(collective_device(group, x.device), copy=True)
    dist.all_reduce(result, op=getattr(dist.ReduceOp, operation), group=group)
    return result.to(x.device)


def broadcast(x: Tensor, group: Group | None, source: int = 0) -> Tensor:
    """The tensor of the group's rank ``source``; the others pass one of the same shape and dtype."""
    if group is None:
        return x
    there = x.contiguous().to(collective_device(group, x.device))
    dist.broadcast(there, dist.get_global_rank(group, source), group=group)
    return there.to(x.device)
