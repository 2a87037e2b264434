"""Runs of the examples in processes of their own, and what they leave in the run folder."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from protoclip_losses.prototypes.extra_state import unpack

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIME_LIMIT = 240


def start(
    *arguments: str, script: str = "train_cc3m.py", launcher: tuple[str, ...] = (), threads: int = 1
) -> subprocess.Popen[str]:
    # Bars are redrawn after each batch, as that is how the tests see where a run is.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(EXAMPLES / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], limit: float = TIME_LIMIT) -> str:
    """All it wrote; its whole session is killed if it takes too long."""
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        written = process.communicate()[0]
        pytest.fail(f"the example took more than {limit} s:\n{written[-3000:]}")


def run(*arguments: str, status: int = 0, **how: Any) -> str:
    process = start(*arguments, **how)
    written = finish(process)
    assert process.returncode == status, written[-3000:]
    return written


def run_until(pattern: str, number: signal.Signals, delay: float, *arguments: str, status: int = 0, **how: Any) -> str:
    """Start the example, wait until its output matches, wait `delay`, send the signal to its session; what it wrote."""
    process = start(*arguments, **how)
    watchdog = threading.Timer(TIME_LIMIT, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    written = ""
    assert process.stdout is not None
    # As it comes and not by line: a progress bar ends its lines with a carriage return.
    while not re.search(pattern, written[-2000:]):
        part = os.read(process.stdout.fileno(), 1000).decode(errors="replace")
        assert part, f"ended before {pattern!r} appeared:\n{written[-3000:]}"
        written += part
    time.sleep(delay)
    os.killpg(process.pid, number)
    written += finish(process)
    watchdog.cancel()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else status), written[-3000:]
    return written


def last_state(run_dir: Path, part: str = "shared") -> dict[str, Any]:
    pointer = json.loads((run_dir / "checkpoint.json").read_text())
    state: dict[str, Any] = torch.load(run_dir / pointer["folder"] / f"{part}.pt", weights_only=True)
    return state


def loss_states(run_dir: Path) -> list[dict[str, Any]]:
    """What is saved of the loss: once, or in online mode by each rank; its extra state unpacked."""
    pointer = json.loads((run_dir / "checkpoint.json").read_text())
    states = [last_state(run_dir, part) for part in ("shared", *(f"rank{rank}" for rank in range(pointer["world_size"])))]
    return [{"_extra_state": unpack(state["loss"]["_extra_state"])} for state in states if "loss" in state]


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(whole: Path, interrupted: Path) -> None:
    """The same weights, optimizer, prototypes and metrics, bit for bit."""
    one, other = last_state(whole), last_state(interrupted)
    assert one["progress"]["step"] == other["progress"]["step"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for number, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][number][key]) for key, value in state.items())
    assert same(loss_states(whole), loss_states(interrupted))
    assert records(whole) == records(interrupted)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def holds_prototypes(run_dir: Path) -> bool:
    """Each rank's loss, in either mode."""
    states = [state["_extra_state"] for state in loss_states(run_dir)]
    return all(state["is_set"] and state["prototypes"] is not None for state in states)


def assert_clustering_is_in_tensorboard(whole: Path, interrupted: Path, builds: int) -> None:
    """Every build's report, with drift from the second on: also where the build before it was in another process."""
    counts = {"text/objective": builds, "image-text/ami": builds, "text/drift": builds - 1, "image/changed": builds - 1}
    for tag, count in counts.items():
        values = scalars(whole, f"clustering/{tag}")
        assert len(values) == count, tag
        # What was done again after a kill is logged again, as it was.
        assert sorted(set(scalars(interrupted, f"clustering/{tag}"))) == values


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard would show for a tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]
