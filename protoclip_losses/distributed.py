"""All that this library knows of torch.distributed.

Each rank holds its own rows. InfoNCE sees the texts of all ranks and gives the gradient of each back to its owner::

    rank 0   images z0 ──┐                  ┌── rows z0 with [t0 t1] ──┐  column sums over ranks,
    texts t0 ── gather ──┼──── [t0 t1] ─────┤                          ├─ then the texts' gradient,
    rank 1   images z1 ──┘                  └── rows z1 with [t0 t1] ──┘  summed to the rank that owns them

A rank's loss is its share: ``world_size * (sum over its rows) / (rows of all ranks)``. The mean of the shares is the loss
of the whole batch, and the mean of the gradients, which DDP takes, is the gradient of one process on the whole batch.

Rows and sums stay on their device, and nothing there is read. Sizes and verdicts are numbers that Python reads: they travel over
the CPU where the group has a backend for it.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ._collectives import Group, RankRows, all_gather, backends, broadcast, collective_device, rank, sum_over_ranks, world_size

__all__ = [
    "Group",
    "RankRows",
    "all_gather",
    "backends",
    "broadcast",
    "collective_device",
    "rank",
    "sum_over_ranks",
    "world_size",
]

T = TypeVar("T")
Signature = Callable[[], Mapping[str, object]]  # what must be equal on all ranks, by name


def check_process_group(value: Any) -> Any:
    """Check a process group: None (the default one), False (stay local), a group, or a mesh of one dimension, which has one."""
    if value is None or value is False:
        return value
    if torch.distributed.is_available():
        if isinstance(value, torch.distributed.ProcessGroup) or value is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            return value
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(value, DeviceMesh):
            if value.ndim == 1:
                return value.get_group()
            names = value.mesh_dim_names
            hint = f"mesh[{names[0]!r}]" if names else "the mesh's get_group(0), or a mesh with mesh_dim_names"
            raise ValueError(
                f"process_group must be one dimension of a DeviceMesh, that of data parallelism, such as {hint}, got a mesh with "
                f"{value.ndim} dimensions {names or tuple(value.mesh.shape)}"
            )
    raise TypeError(
        "process_group must be None (the default group), False (this process alone), a torch.distributed.ProcessGroup or one "
        f"dimension of a DeviceMesh, got {value!r}"
    )


def active_group(process_group: Group | bool | None) -> Group | None:
    """The group to talk to; None for one process: nothing is initialised, the group has one member, or ``False`` was given."""
    process_group = check_process_group(process_group)
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    if dist.get_rank(group) < 0:
        raise ValueError("process_group does not contain this rank")
    return group if dist.get_world_size(group) > 1 else None


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
) -> tuple[T, RankRows]:
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
    numbers = int(failure is not None), rows, zlib.crc32(own_signature.encode()), own_digest
    verdicts = _exchanged(numbers, group, getattr(like, "device", None))
    if failure is not None:
        raise failure
    failed = [r for r, (has_failed, *_) in enumerate(verdicts) if has_failed]
    if failed:
        raise ValueError(f"bad input on rank(s) {failed}: the error raised there says which; this rank's input was fine")
    if len({code for _, _, code, _ in verdicts}) > 1:
        raise ValueError(_difference([json.loads(text) for text in gather_strings(own_signature or "{}", group)]))
    return result, RankRows(group, [n for _, n, *_ in verdicts], [digest for *_, digest in verdicts])


@torch.compiler.disable  # type: ignore[untyped-decorator]  # numbers that Python reads have no place in a traced graph
def _exchanged(numbers: Sequence[int], group: Group, device: torch.device | None) -> list[list[int]]:
    there = collective_device(group, torch.device("cpu"), device)
    return cast(list[list[int]], torch.stack(all_gather(torch.tensor(numbers, device=there), group)).tolist())


def _difference(signatures: Sequence[Mapping[str, str]]) -> str:
    names = [name for name in {**signatures[0], **signatures[-1]} if len({s.get(name) for s in signatures}) > 1]
    values = (f"{name}, got " + ", ".join(f"{s.get(name)} on rank {r}" for r, s in enumerate(signatures)) for name in names)
    return f"ranks must agree on {'; on '.join(values)}"


def gather_strings(text: str, group: Group | None) -> list[str]:
    """Every rank's string, in rank order."""
    if group is None:
        return [text]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(collective_device(group))
    sizes = gather_sizes(len(data), group)
    return [bytes(part.tolist()).decode() for part in torch.split(RankRows(group, sizes).gather(data), sizes)]


def even_batches(batches: Iterable[Any], process_group: Group | bool | None = None) -> Iterator[Any]:
    """The batches, for as long as every rank has one: ranks with unequal numbers of them stop together, and none hangs.

    Ranks exchange a number before each batch, over the CPU where the group has a backend for it. An error on one rank is raised
    on all.

    Example:
        >>> list(even_batches([1, 2, 3]))
        [1, 2, 3]
    """
    group, iterator, end = active_group(process_group), iter(batches), object()
    batch: Any = end

    def read() -> None:
        nonlocal batch
        batch = next(iterator, end)

    while True:
        _, ranks = validate_rows(read, group, 0, digest=lambda: int(batch is not end))
        if batch is end or not all(ranks.digests):
            return
        yield batch
