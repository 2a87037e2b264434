"""Collectives of a training step, counted over two gloo processes on this machine.

    python -m benchmarks.speed.collectives

Each row is a call of a loss and its backward, after two that are not counted. The exchange is that of sizes and verdicts, which
Python waits for; all others are on the device of the features, and are not waited for. Another version of the library on
PYTHONPATH is counted in the same way.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip_losses import (
    EpisodicClusterer,
    FeatureBank,
    InfoNCE,
    OnlinePrototypes,
    ProtoLoss,
    Prototypes,
    RelationalDistillation,
    TeacherAdapter,
    __version__,
)

WORLD_SIZE, BATCH, WIDTH, K = 2, 8, 16, 4


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives, and of those the ones of sizes and verdicts, which gather four integers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.exchange = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.total += 1
            self.exchange += func.overloadpacket.__name__ == "allgather_" and args[1][0].numel() == 4
        return func(*args, **(kwargs or {}))


def rows(seed: int, count: int = BATCH, width: int = WIDTH) -> Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def built() -> Prototypes:
    """Prototypes of an episode with a teacher, the same on each rank."""
    bank = FeatureBank.from_features(torch.arange(64), image=rows(1, 64), text=rows(2, 64))
    return EpisodicClusterer(K, process_group=False).build(bank, {"t": TeacherAdapter.from_tensor(rows(3, 64))})


def step(make: Callable[..., Any], settings: dict[str, Any], source: Any, **keywords: Any) -> Callable[[], Tensor]:
    loss = make(**settings)
    if make is ProtoLoss:
        loss.set_prototypes(source)
    rank = dist.get_rank()
    image, text = (rows(rank + seed).requires_grad_() for seed in (10, 20))
    other = rows(rank + 30) if make is RelationalDistillation else text
    return lambda: loss(image, other, 9.0, **keywords)


def calls(promise: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    index = torch.arange(BATCH) + BATCH * dist.get_rank()
    ids, teachers = torch.arange(BATCH) % 5, {"t": rows(dist.get_rank() + 40)}
    full = {"w_distill": 1.0, "repeats": "share", **promise}
    return {
        "InfoNCE": step(InfoNCE, promise, None),
        'InfoNCE, repeats="share"': step(InfoNCE, {"repeats": "share", **promise}, None, ids=ids),
        "RelationalDistillation": step(RelationalDistillation, promise, None),
        "ProtoLoss, two internal and two external terms": step(ProtoLoss, promise, built(), index=index),
        "the same with distillation and repeats": step(ProtoLoss, full, built(), index=index, ids=ids, teacher_features=teachers),
        "ProtoLoss online, between renewals": step(ProtoLoss, promise, OnlinePrototypes(K, 64, every=100, warmup=1)),
    }


def counted(call: Callable[[], Tensor]) -> Sequence[int]:
    """(exchange, others) in forward, and all in backward."""
    for _ in range(2):
        call()
    with Collectives() as forward:
        loss = call()
    with Collectives() as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return forward.exchange, forward.total - forward.exchange, backward.total


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    has_promise = "equal_batch_sizes" in inspect.signature(InfoNCE).parameters
    found: dict[str, list[Sequence[int]]] = {}
    for promise in ({}, {"equal_batch_sizes": True}) if has_promise else ({},):
        for name, call in calls(promise).items():
            found.setdefault(name, []).append(counted(call))
    if rank == 0:
        print(f"protoclip_losses {__version__}, torch {torch.__version__}, {WORLD_SIZE} gloo processes")
        print("exchange + others in forward, backward; then the same with equal_batch_sizes=True")
        for name, numbers in found.items():
            print(f"{name:48}", *(f"{exchange} + {others}, {backward}" for exchange, others, backward in numbers), sep="    ")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(work, (place,), nprocs=WORLD_SIZE)  # type: ignore[attr-defined, no-untyped-call]
