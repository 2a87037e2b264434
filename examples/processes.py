"""The processes of a run: one per GPU or CPU core, started by torchrun, stopped together by a signal."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def start_processes(device: str = "auto") -> tuple[int, int, torch.device]:
    """(rank, world_size, device of this process). Joins the process group if torchrun has started several."""
    atexit.register(kill_workers)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(own)
    if world_size > 1:
        # A long timeout: the other ranks wait while rank 0 indexes the data and runs the teacher.
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(hours=12))
    return rank, world_size, own


def kill_workers() -> None:
    """End the loader workers that an error has left: they ignore SIGTERM, and Python would wait for them at exit."""
    for worker in multiprocessing.active_children():
        worker.kill()


class StopSignal:
    """SIGTERM or Ctrl-C asks the loop to save and stop after the current batch; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        self.forget()

    def forget(self) -> None:
        """Restore the default: from now on a signal ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def asked(self, batches_seen: int, world_size: int, device: torch.device) -> bool:
        """Whether any rank has received a signal. Ranks exchange this every tenth batch, so that all stop after the same one."""
        if world_size == 1:
            return self.received
        if batches_seen % 10:
            return False
        flag = torch.tensor(int(self.received), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
