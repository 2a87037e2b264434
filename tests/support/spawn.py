"""Real gloo processes: runs rank cases on each rank, once per world size.

A worker ends by barrier, destroy_process_group and os._exit, and the parent waits for it under a time limit: left to the
interpreter's own shutdown, gloo's threads abort or hang now and then.
"""

import importlib.util
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import child_environment


def run(cases, world_size, folder, time_limit=120):
    """Run each ``case(rank, world_size, folder)``, given as "file.py::name", on processes that meet in ``folder``.

    Returns what :func:`failure` needs to say how each of them went.
    """
    processes = []
    for rank in range(world_size):
        with open(folder / f"log.{rank}", "w") as log:
            arguments = [sys.executable, __file__, str(rank), str(world_size), str(folder), *cases]
            processes.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=child_environment()))
    deadline = time.monotonic() + time_limit
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(p.poll() for p in processes):  # one has failed: the others have this long to say so too
            deadline = min(deadline, time.monotonic() + 5)
    for p in processes:
        p.kill()
        p.wait()
    return world_size, folder


def outcome(case, rank, folder):
    """The file in which a rank says how a case went: its traceback, or nothing."""
    path, name = case.split("::")
    return folder / f"{Path(path).stem}.{name}.{rank}"


def failure(case, world_size, folder):
    """What went wrong with a case on any rank, or an empty string."""
    outcomes = [outcome(case, rank, folder) for rank in range(world_size)]
    failures = [f"rank {rank} failed\n{o.read_text()}" for rank, o in enumerate(outcomes) if o.exists() and o.read_text()]
    missing = [rank for rank, o in enumerate(outcomes) if not o.exists()]
    if len(missing) == world_size:
        failures.append("did not end on any rank: it hung or died there, or was not reached after a failure")
    elif missing:
        failures.append(f"did not end on ranks {missing}")
    logs = [(folder / f"log.{rank}").read_text()[-1000:] for rank in missing]
    return "\n".join([*failures, *filter(None, logs)])


def load(path):
    """The module in a file, imported once."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def work(rank, world_size, folder, cases):
    torch.set_num_threads(1)
    meet = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    for case in cases:
        path, name = case.split("::")
        try:
            getattr(load(path), name)(rank, world_size, folder)
            dist.barrier()
        except BaseException:
            outcome(case, rank, folder).write_text(traceback.format_exc())
            leave(1)
        outcome(case, rank, folder).write_text("")
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def leave(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
