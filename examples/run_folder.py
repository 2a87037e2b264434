"""The run folder: its log, its metrics, and checkpoints that a kill at any moment leaves whole."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("train")
POINTER, ARGUMENTS = "checkpoint.json", "arguments.json"
# What may differ between a run and its resumption, as it does not change a single weight.
FREE_ON_RESUME = {"resume", "run_dir", "workers", "log_every", "save_every"}


def resumed_arguments(parser: argparse.ArgumentParser, run_dir: Path | None) -> argparse.Namespace:
    """The arguments of the run in `run_dir`; one that is given again has to be the same."""
    if run_dir is None:
        parser.error("--resume needs --run-dir, the folder of the run to go on with")
    if not (run_dir / ARGUMENTS).exists():
        parser.error(f"--resume: {run_dir} holds no {ARGUMENTS}, so it is not the folder of a run")
    kept = json.loads((run_dir / ARGUMENTS).read_text())
    parser.set_defaults(**kept)
    args = parser.parse_args()
    changed = [name for name, value in kept.items() if name not in FREE_ON_RESUME and getattr(args, name) != value]
    if changed:
        named = ", ".join(f"--{name.replace('_', '-')} (was {kept[name]})" for name in changed)
        parser.error(f"--resume goes on with the arguments of the run; these differ: {named}")
    return args


def open_run_dir(args: argparse.Namespace, rank: int, world_size: int) -> Path:
    """Make the folder of the run, or find it on resume, and start its log. Every rank gets the same path."""
    chosen: list[Any] = [args.run_dir]
    if rank == 0:
        if args.run_dir is None:
            numbered = (Path("runs") / f"{args.method}-{number}" for number in itertools.count(1))
            chosen[0] = next(folder for folder in numbered if not folder.exists())
        if not args.resume and (chosen[0] / ARGUMENTS).exists():
            raise SystemExit(f"{chosen[0]} already holds a run: add --resume to go on with it, or name another --run-dir")
        chosen[0].mkdir(parents=True, exist_ok=True)
    if world_size > 1:
        dist.broadcast_object_list(chosen, 0)
    run_dir = Path(chosen[0])
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    handlers: list[logging.Handler] = [_BesideBars()]
    if rank == 0:
        handlers.append(logging.FileHandler(run_dir / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    if rank == 0 and not args.resume:
        kept = {name: value for name, value in vars(args).items() if name not in ("resume", "run_dir")}
        _write_text(run_dir / ARGUMENTS, json.dumps(kept, indent=1))
    return run_dir


class _BesideBars(logging.Handler):
    """Writes above the progress bars, where a plain handler would cut through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Metrics:
    """metrics.jsonl and TensorBoard, written by rank 0."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.last_loss = float("nan")
        self.path = run_dir / "metrics.jsonl"
        self.folder = run_dir / "tensorboard"
        self.file = open(self.path, "ab") if rank == 0 else None  # noqa: SIM115  closed by close()
        self.board: Any = None

    def cut_back(self, size: int, step: int) -> None:
        """Drop what was written after the checkpoint: the resumed run writes it again."""
        if self.file is not None:
            self.file.truncate(size)
            self.board = self._open_board(purge_step=step + 1)

    def write(self, step: int, episode: int, learning_rate: float, values: dict[str, Tensor], world_size: int) -> None:
        """One line of the means over ranks. Called by all ranks."""
        row = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if world_size > 1:
            dist.all_reduce(row)
            row /= world_size
        numbers = dict(zip(values, row.tolist(), strict=True))
        self.last_loss = numbers["loss"]
        if not math.isfinite(self.last_loss):
            raise SystemExit(
                f"the loss is {self.last_loss} after step {step}: lower --learning-rate, or raise --precision. "
                f"The last checkpoint is in {self.path.parent}"
            )
        if self.file is not None:
            line = {"step": step, "episode": episode, "learning_rate": learning_rate, **numbers}
            self.file.write(json.dumps(line).encode() + b"\n")
            self.board = self.board or self._open_board(None)
            for name, number in numbers.items():
                self.board.add_scalar(name, number, step)

    def log_scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """Numbers that come once an episode, to TensorBoard as `prefix/name`; those of rank 0."""
        if self.file is not None:
            self.board = self.board or self._open_board(None)
            for name, number in values.items():
                self.board.add_scalar(f"{prefix}/{name}", number, step)

    def flush(self) -> int:
        """Put everything on disk and return the size of metrics.jsonl."""
        if self.file is None:
            return 0
        if self.board is not None:
            self.board.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        for writer in (self.file, self.board):
            if writer is not None:
                writer.close()

    def _open_board(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=purge_step)


class StopSignal:
    """SIGTERM or Ctrl-C asks the loop to save and stop after the batch; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        self.forget()

    def forget(self) -> None:
        """From now on such a signal ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def asked(self, ticks: int, world_size: int, device: torch.device) -> bool:
        """Whether any rank was asked. Several ranks compare notes every tenth batch, so that all stop after the same one."""
        if world_size == 1:
            return self.received
        if ticks % 10:
            return False
        flag = torch.tensor(int(self.received), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def save_checkpoint(run_dir: Path, number: int, rank: int, world_size: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Write `shared` (equal on every rank; rank 0 writes it) and each rank's `own` to a new folder; then move the pointer.

    Until the pointer has moved, a resume finds the checkpoint before, complete.
    """
    folder = run_dir / "checkpoints" / f"{number:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    _write_state(folder / f"rank{rank}.pt", own)
    if rank == 0:
        _write_state(folder / "shared.pt", shared)
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        _write_text(run_dir / POINTER, json.dumps({"folder": str(folder.relative_to(run_dir)), "world_size": world_size}))
        for other in folder.parent.iterdir():
            # Older ones only: another rank may have begun the next checkpoint already.
            if other.name < folder.name:
                shutil.rmtree(other)


def load_checkpoint(run_dir: Path, rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(shared, own) of the last complete checkpoint, on the CPU, or None if the run was ended before its first one.

    Nothing but tensors and plain values is unpickled.
    """
    if not (run_dir / POINTER).exists():
        return None
    pointer = json.loads((run_dir / POINTER).read_text())
    if pointer["world_size"] != world_size:
        raise SystemExit(
            f"--resume: the run in {run_dir} has {pointer['world_size']} processes, each with its part of the feature bank, and "
            f"this start has {world_size}: start as many as before"
        )
    folder = run_dir / pointer["folder"]
    files = (folder / "shared.pt", folder / f"rank{rank}.pt")
    shared, own = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    return shared, own


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    """Write and rename: the file is the old one or the new one, never half of it."""
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
