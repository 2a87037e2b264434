"""All that this library knows of torch.distributed.

Each rank holds its own rows. InfoNCE sees the texts of all ranks and gives the gradient of each back to its owner::

    rank 0   images z0 ──┐                  ┌── rows z0 against [t0 t1] ──┐  column sums over ranks,
    texts t0 ── gather ──┼──── [t0 t1] ─────┤                             ├─ then the texts' gradient,
    rank 1   images z1 ──┘                  └── rows z1 against [t0 t1] ──┘  of which each rank keeps its part

A rank's loss is its share: ``world_size * (sum over its rows) / (rows of all ranks)``. The mean of the shares is the loss
of the whole batch, and the mean of the gradients, which DDP takes, is the gradient of one process on the whole batch.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup; not importable from builds without distributed
T = TypeVar("T")


def active_group(process_group: Group | bool | None) -> Group | None:
    """The group to talk to, or None where there is nobody: not initialised, one process, or ``False`` (stay local)."""
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    if dist.get_rank(group) < 0:
        raise ValueError("process_group does not contain this rank")
    return group if dist.get_world_size(group) > 1 else None


def world_size(group: Group | None) -> int:
    """Number of processes in the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group | None) -> int:
    """This process's rank in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def device_of(group: Group) -> torch.device:
    """Where tensors have to lie for the group's collectives when they have no device of their own."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")


def all_gather(x: Tensor, group: Group) -> list[Tensor]:
    """Tensors of equal shape, one a rank, in the order of ranks."""
    x = x.contiguous()
    out = [torch.empty_like(x) for _ in range(world_size(group))]
    dist.all_gather(out, x, group=group)
    return out


def agree(
    check: Callable[[], T], group: Group | None, rows: int = 0, same: Callable[[], object] | None = None
) -> tuple[T, list[int]]:
    """Run ``check`` on every rank and share the verdict: all go on, with every rank's ``rows``, or all raise together.

    ``same`` is what all ranks must have in common (widths, dtypes, names): a collective over anything else hangs.
    """
    if group is None:
        return check(), [rows]
    failure: Exception | None = None
    kind = ""
    try:
        result = check()
        kind = repr(same()) if same is not None else ""
    except Exception as error:
        failure = error
    mine = torch.tensor([int(failure is not None), rows, zlib.crc32(kind.encode())], device=device_of(group))
    verdicts = torch.stack(all_gather(mine, group)).tolist()
    if failure is not None:
        raise failure
    failed = [r for r, (bad, _, _) in enumerate(verdicts) if bad]
    if failed:
        raise ValueError(f"bad input on rank(s) {failed}: the error raised there says which; this rank's input was fine")
    if len({code for _, _, code in verdicts}) > 1:
        raise ValueError(f"ranks must pass input of one kind, and they differ; this rank has {kind}")
    return result, [n for _, n, _ in verdicts]


def gather_rows(x: Tensor, sizes: list[int], group: Group | None) -> Tensor:
    """Every rank's rows, in the order of ranks; ``sizes`` says how many each has (unequal or none is fine). No gradient."""
    if group is None:
        return x
    here = x.detach()
    if dist.get_backend(group) == "nccl" and here.device.type == "cpu":
        here = here.to(device_of(group))
    padded = here.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = here
    rows = [part[:n] for part, n in zip(all_gather(padded, group), sizes, strict=True)]
    return torch.cat(rows).to(x.device)


def gather_texts(text: str, group: Group | None) -> list[str]:
    """Every rank's text, in the order of ranks."""
    if group is None:
        return [text]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device_of(group))
    sizes = agree(lambda: None, group, len(data))[1]
    return [bytes(part.tolist()).decode() for part in torch.split(gather_rows(data, sizes, group), sizes)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_rows(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: rank(ctx.group)])
        return sum_over_ranks(grad, ctx.group)[start : start + ctx.sizes[rank(ctx.group)]], None, None


def gather_rows_with_gradient(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """:func:`gather_rows`, differentiable: the gradients of all ranks flow back to the owner of a row."""
    gathered: Tensor = _GatherRows.apply(x, sizes, group)  # type: ignore[no-untyped-call]
    return gathered


def in_step(batches: Iterable[Any], process_group: Group | bool | None = None) -> Iterator[Any]:
    """The batches, as long as every rank has one: ranks with unequal numbers of them stop together, and none waits for another.

    Ranks compare notes before each batch, on a GPU after the work before it. An error on one rank is raised on all.

    Example:
        >>> list(in_step([1, 2, 3]))
        [1, 2, 3]
    """
    group, iterator, end = active_group(process_group), iter(batches), object()
    while True:
        batch, _ = agree(lambda: next(iterator, end), group)
        _, has = agree(lambda: None, group, int(batch is not end))
        if not all(has):
            return
        yield batch


def sum_over_ranks(x: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks, as a new tensor on the device of ``x``. No gradient."""
    return _reduced(x, "SUM", group)


def max_over_ranks(x: Tensor, group: Group | None) -> Tensor:
    """The elementwise maximum over ranks, as a new tensor on the device of ``x``. No gradient."""
    return _reduced(x, "MAX", group)


def _reduced(x: Tensor, operation: str, group: Group | None) -> Tensor:
    if group is None:
        return x
    result = x.detach().clone()
    if dist.get_backend(group) == "nccl":
        result = result.to(device_of(group))
    dist.all_reduce(result, op=getattr(dist.ReduceOp, operation), group=group)
    return result.to(x.device)


class Ranks:
    """The processes that a batch is spread over, and how many rows each has; one process alone talks to nobody."""

    def __init__(self, group: Group | None = None, sizes: Sequence[int] = ()) -> None:
        self.group, self.sizes = group, list(sizes)

    def own(self, rows: int) -> slice:
        """Where this rank's ``rows`` lie among those of all."""
        start = sum(self.sizes[: rank(self.group)])
        return slice(start, start + rows)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows."""
        return gather_rows(x, self.sizes, self.group)

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum."""
        return max_over_ranks(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The elementwise sum."""
        return sum_over_ranks(x, self.group)

    def logsumexp(self, x: Tensor) -> Tensor:
        """log of the elementwise sum of exponentials; -inf where every rank has it."""
        if self.group is None:
            return x
        top = self.maximum(x)
        base = top.clamp(min=torch.finfo(x.dtype).min)  # -inf less -inf would be NaN
        return self.sum((x - base).exp()).log() + top


ALONE = Ranks()


def broadcast(x: Tensor, group: Group | None, source: int = 0) -> Tensor:
    """The tensor of the group's rank ``source``; the others pass one of the same shape and dtype."""
    if group is None:
        return x
    there = x.contiguous().to(device_of(group) if dist.get_backend(group) == "nccl" else x.device)
    dist.broadcast(there, dist.get_global_rank(group, source), group=group)
    return there.to(x.device)
