"""Real gloo processes: runs the cases of test modules on each rank, once per world size.

A worker ends by barrier, destroy_process_group and os._exit, and the parent waits for it under a time limit: left to the
interpreter's own shutdown, gloo's threads abort or hang now and then.
"""

import importlib
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run(modules, world_size, folder, time_limit=120):
    """Run each ``case(rank, world_size, folder)`` in the modules' CASES, on processes that meet in ``folder``.

    Returns what :func:`failure` needs to say how each of them went.
    """
    processes = []
    for rank in range(world_size):
        with open(folder / f"log.{rank}", "w") as log:
            arguments = [sys.executable, __file__, str(rank), str(world_size), str(folder), *modules]
            processes.append(subprocess.Popen(arguments, stdout=log, stderr=log))
    deadline = time.monotonic() + time_limit
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(p.poll() for p in processes):  # one has failed: the others have this long to say so too
            deadline = min(deadline, time.monotonic() + 5)
    for p in processes:
        p.kill()
        p.wait()
    return world_size, folder


def failure(case, world_size, folder):
    """What went wrong with a case on any rank, or an empty string."""
    outcomes = [folder / f"{case}.{rank}" for rank in range(world_size)]
    failures = [f"rank {rank} failed\n{o.read_text()}" for rank, o in enumerate(outcomes) if o.exists() and o.read_text()]
    missing = [rank for rank, outcome in enumerate(outcomes) if not outcome.exists()]
    if len(missing) == world_size:
        failures.append("did not end on any rank: it hung or died there, or was not reached after a failure")
    elif missing:
        failures.append(f"did not end on ranks {missing}")
    logs = [(folder / f"log.{rank}").read_text()[-1000:] for rank in missing]
    return "\n".join([*failures, *filter(None, logs)])


def work(rank, world_size, folder, modules):
    torch.set_num_threads(1)
    meet = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    for case in (case for module in modules for case in importlib.import_module(module).CASES):
        outcome = folder / f"{case.__name__}.{rank}"
        try:
            case(rank, world_size, folder)
            dist.barrier()
        except BaseException:
            outcome.write_text(traceback.format_exc())
            leave(1)
        outcome.write_text("")
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def leave(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
