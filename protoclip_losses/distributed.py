"""All that this library knows of torch.distributed.

Each rank holds its own rows. InfoNCE sees the texts of all ranks and gives the gradient of each back to its owner::

    rank 0   images z0 ──┐                  ┌── rows z0 against [t0 t1] ──┐  column sums over ranks,
    texts t0 ── gather ──┼──── [t0 t1] ─────┤                             ├─ then the texts' gradient,
    rank 1   images z1 ──┘                  └── rows z1 against [t0 t1] ──┘  of which each rank keeps its part

A rank's loss is its share: ``world_size * (sum over its rows) / (rows of all ranks)``. The mean of the shares is the loss
of the whole batch, and the mean of the gradients, which DDP takes, is the gradient of one process on the whole batch.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks

Group = Any  # torch.distributed.ProcessGroup; not importable from builds without distributed
T = TypeVar("T")
Signature = Callable[[], Mapping[str, object]]  # what must be equal on all ranks, by name
check_process_group = _checks.process_group


def active_group(process_group: Group | bool | None) -> Group | None:
    """The group to talk to; None for one process: nothing is initialised, the group has one member, or ``False`` was given."""
    process_group = check_process_group(process_group)
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


def collective_device(group: Group, *wanted: torch.device | None) -> torch.device:
    """Where a tensor must be for the group's collectives: the first of the ``wanted`` devices whose type the group serves.

    Without one, the CPU if it is served, else the group's own device, or the present one of a type that is.
    """
    served = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
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


def validate_on_all_ranks(check: Callable[[], T], group: Group | None, signature: Signature | None = None) -> T:
    """Run ``check`` on every rank and share the verdict: all continue, or all raise together.

    ``signature`` is what must be equal on all ranks (widths, dtypes, settings), by name: a collective would hang otherwise.

    Raises:
        Exception: on the rank whose check failed, what it raised.
        ValueError: on the other ranks, naming that rank; on all ranks if signatures differ, naming what differs.
    """
    return validate_rows(check, group, 0, signature)[0]


def gather_sizes(rows: int, group: Group | None) -> list[int]:
    """The number of rows of every rank."""
    return list(validate_rows(lambda: None, group, rows)[1].sizes)


def validate_rows(
    check: Callable[[], T],
    group: Group | None,
    rows: int,
    signature: Signature | None = None,
    like: object = None,
    digest: Callable[[], int] | None = None,
) -> tuple[T, "RankRows"]:
    """:func:`validate_on_all_ranks` and :func:`gather_sizes` by one collective, for calls that belong to a training step.

    A group without the CPU exchanges on the device of ``like``. ``digest`` is of what no two ranks should hold alike.
    """
    if group is None:
        return check(), RankRows(None, [rows])
    failure: Exception | None = None
    own_signature, own_digest = "", 0
    try:
        result = check()
        own_digest = 0 if digest is None else digest()
        own_signature = "" if signature is None else json.dumps({name: repr(value) for name, value in signature().items()})
    except Exception as error:
        failure = error
    device = collective_device(group, torch.device("cpu"), getattr(like, "device", None))
    numbers = int(failure is not None), rows, zlib.crc32(own_signature.encode()), own_digest
    verdicts = torch.stack(all_gather(torch.tensor(numbers, device=device), group)).tolist()
    if failure is not None:
        raise failure
    failed = [r for r, (has_failed, *_) in enumerate(verdicts) if has_failed]
    if failed:
        raise ValueError(f"bad input on rank(s) {failed}: the error raised there says which; this rank's input was fine")
    if len({code for _, _, code, _ in verdicts}) > 1:
        raise ValueError(_difference([json.loads(text) for text in gather_strings(own_signature or "{}", group)]))
    return result, RankRows(group, [n for _, n, *_ in verdicts], [digest for *_, digest in verdicts])


def _difference(signatures: Sequence[Mapping[str, str]]) -> str:
    names = [name for name in {**signatures[0], **signatures[-1]} if len({s.get(name) for s in signatures}) > 1]
    values = (f"{name}, got " + ", ".join(f"{s.get(name)} on rank {r}" for r, s in enumerate(signatures)) for name in names)
    return f"ranks must agree on {'; on '.join(values)}"


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
        if self.group is None:
            return x
        here = x.detach().to(collective_device(self.group, x.device))
        padded = here.new_zeros((max(self.sizes), *x.shape[1:]))
        padded[: x.shape[0]] = here
        rows = [part[:n] for part, n in zip(all_gather(padded, self.group), self.sizes, strict=True)]
        return torch.cat(rows).to(x.device)

    def gather_with_gradient(self, x: Tensor) -> Tensor:
        """:meth:`gather`, differentiable: the gradients of all ranks flow back to the owner of a row."""
        gathered: Tensor = _GatherRows.apply(x, self)  # type: ignore[no-untyped-call]
        return gathered

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks."""
        return _reduced(x, "MAX", self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The elementwise sum over ranks."""
        return sum_over_ranks(x, self.group)

    def logsumexp(self, x: Tensor) -> Tensor:
        """log of the elementwise sum of exponentials over ranks; -inf where every rank has it."""
        if self.group is None:
            return x
        top = self.maximum(x)
        base = top.clamp(min=torch.finfo(x.dtype).min)  # -inf less -inf would be NaN
        return self.sum((x - base).exp()).log() + top


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: RankRows) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grad)[ctx.ranks.own], None


def gather_strings(text: str, group: Group | None) -> list[str]:
    """Every rank's string, in rank order."""
    if group is None:
        return [text]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(collective_device(group))
    sizes = gather_sizes(len(data), group)
    return [bytes(part.tolist()).decode() for part in torch.split(RankRows(group, sizes).gather(data), sizes)]


def even_batches(batches: Iterable[Any], process_group: Group | bool | None = None) -> Iterator[Any]:
    """The batches, for as long as every rank has one: ranks with unequal numbers of them stop together, and none hangs.

    Ranks exchange one number before each batch, on a GPU after the work before it. An error on one rank is raised on all.

    Example:
        >>> list(even_batches([1, 2, 3]))
        [1, 2, 3]
    """
    group, iterator, end = active_group(process_group), iter(batches), object()
    while True:
        batch = validate_on_all_ranks(lambda: next(iterator, end), group)
        if not all(gather_sizes(int(batch is not end), group)):
            return
        yield batch


def sum_over_ranks(x: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks, as a new tensor on the device of ``x``. No gradient."""
    return _reduced(x, "SUM", group)


def _reduced(x: Tensor, operation: str, group: Group | None) -> Tensor:
    if group is None:
        return x
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
