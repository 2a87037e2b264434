"""The run folder: its arguments, its log, and checkpoints that stay complete if the process is killed at any moment."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from files import lock_folder, replacing
from processes import StopSignal
from run_metrics import Metrics
from tqdm import tqdm

log = logging.getLogger("train")
POINTER, ARGUMENTS = "checkpoint.json", "arguments.json"
# Arguments that may differ between a run and its resumption, because no weight depends on them.
FREE_ON_RESUME = {"resume", "run_dir", "workers", "log_every", "save_every"}
NOT_GIVEN = object()
STAGES = ("extraction", "training")  # the two passes over an episode; each draws its own augmentation


def resumed_arguments(parser: argparse.ArgumentParser, run_dir: Path | None, commands: Sequence[str] = ()) -> argparse.Namespace:
    """The arguments of the run in `run_dir`. One that is given again must have the same value.

    One in `commands` that names more than files must be given again: what opens it runs a shell command, and the run folder may
    be somebody else's.
    """
    if run_dir is None:
        parser.error("--resume needs --run-dir, the folder of the run to resume")
    if not (run_dir / ARGUMENTS).exists():
        parser.error(f"--resume: {run_dir} has no {ARGUMENTS}, so it is not the folder of a run")
    kept = json.loads((run_dir / ARGUMENTS).read_text(encoding="utf-8"))
    for name in commands:
        parser.set_defaults(**{name: NOT_GIVEN})
        given = getattr(parser.parse_args(), name) is not NOT_GIVEN
        if not given and isinstance(kept.get(name), str) and ":" in kept[name]:
            parser.error(
                f"--resume needs --{name} again: that of {run_dir / ARGUMENTS} is {kept[name]!r}, which may run a command, and "
                "commands are taken from the command line only"
            )
    parser.set_defaults(**kept)
    args = parser.parse_args()
    changed = [name for name, value in kept.items() if name not in FREE_ON_RESUME and getattr(args, name) != value]
    if changed:
        named = ", ".join(f"--{name.replace('_', '-')} (was {kept[name]})" for name in changed)
        parser.error(f"--resume keeps the arguments of the run; these differ: {named}")
    return args


def open_run_dir(args: argparse.Namespace, rank: int, world_size: int) -> Path:
    """Make the run folder, or find it on resume, and start the log. Every rank gets the same path.

    Rank 0 locks the folder until it ends, so that no two runs write into one.
    """
    chosen: list[Any] = [args.run_dir]
    if rank == 0:
        if args.run_dir is None:
            chosen[0] = _make_free_folder(args.method)
        chosen[0].mkdir(parents=True, exist_ok=True)
        if not lock_folder(chosen[0]):
            raise SystemExit(f"{chosen[0]} is in use by another process: wait until it has ended, or choose another --run-dir")
        if not args.resume and (chosen[0] / ARGUMENTS).exists():
            raise SystemExit(f"{chosen[0]} already holds a run: add --resume to resume it, or choose another --run-dir")
    if world_size > 1:
        dist.broadcast_object_list(chosen, 0)
    run_dir = Path(chosen[0])
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    handlers: list[logging.Handler] = [_AboveBars()]
    if rank == 0:
        handlers.append(logging.FileHandler(run_dir / "log.txt", encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    if rank == 0 and not args.resume:
        kept = {name: value for name, value in vars(args).items() if name not in ("resume", "run_dir")}
        _write_text(run_dir / ARGUMENTS, json.dumps(kept, indent=1))
    return run_dir


def _make_free_folder(method: str) -> Path:
    numbers = itertools.count(1)
    while True:
        folder = Path("runs") / f"{method}-{next(numbers)}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # of an older run, or of one that starts now
            continue


class _AboveBars(logging.Handler):
    """Writes above the progress bars, where a plain handler would write into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@dataclass
class Progress:
    """How far a run is."""

    episode: int = 0
    stage: str = "extraction"
    batches_done: int = 0  # of this stage
    batches_seen: int = 0  # of all stages of the run
    step: int = 0  # optimizer steps of the run
    saves: int = 0  # checkpoints of the run

    def begin(self, stage: str) -> None:
        self.stage, self.batches_done = stage, 0

    def next_episode(self) -> None:
        self.episode += 1
        self.begin("extraction")

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class RandomState:
    """The state of torch's global generators: of the CPU, and of this process's GPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device if device.type == "cuda" else None

    def state_dict(self) -> dict[str, Any]:
        gpu = None if self.gpu is None else torch.cuda.get_rng_state(self.gpu)
        return {"cpu": torch.get_rng_state(), "gpu": gpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.gpu is not None:
            torch.cuda.set_rng_state(state["gpu"], self.gpu)


class RunState:
    """Everything that a run resumes from: its progress, its metrics, the random state, and the objects registered here.

    A killed process loses the batches since the last checkpoint; after :meth:`load` it computes them again, bit for bit.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, device: torch.device, save_every: int) -> None:
        self.run_dir, self.rank, self.world_size, self.device = run_dir, rank, world_size, device
        self.save_every = save_every
        self.progress, self.metrics = Progress(), Metrics(run_dir, rank, world_size)
        self._stop = StopSignal()
        self._objects: dict[str, tuple[Any, bool]] = {}
        self._loaded: dict[str, Any] = {}
        self.register("progress", self.progress)
        self.register("metrics", self.metrics)
        self.register("random", RandomState(device), per_rank=True)

    def register(self, name: str, obj: Any, *, per_rank: bool = False) -> None:
        """Save `obj` (it has `state_dict` and `load_state_dict`) in every checkpoint from now on.

        A state that is equal on all ranks is written by rank 0; with `per_rank` each rank writes its own. An object that exists
        only during a stage, such as a feature bank, is registered when it is made. If the run was resumed in that stage, the
        object is restored then.
        """
        self._objects[name] = (obj, per_rank)
        if name in self._loaded:
            try:
                obj.load_state_dict(self._loaded.pop(name))
            except ValueError as error:
                raise SystemExit(f"--resume: {name!r} of the checkpoint does not fit this run: {error}") from error

    def unregister(self, name: str) -> None:
        """Leave `name` out of later checkpoints."""
        del self._objects[name]

    def save(self) -> None:
        """Write a checkpoint. Collective: every rank calls it."""
        self.progress.saves += 1
        shared, own = (
            {name: obj.state_dict() for name, (obj, per_rank) in self._objects.items() if per_rank == wanted}
            for wanted in (False, True)
        )
        save_checkpoint(self.run_dir, self.progress.saves, self.rank, self.world_size, shared, own)

    def load(self) -> None:
        """Restore the registered objects from the last checkpoint. A run that has none yet starts from its beginning."""
        loaded = load_checkpoint(self.run_dir, self.rank, self.world_size)
        if loaded is not None:
            self._loaded = {**loaded[0], **loaded[1]}
            if missing := self._objects.keys() - self._loaded.keys():
                raise SystemExit(
                    f"--resume: the checkpoint in {self.run_dir} must hold {', '.join(sorted(missing))}, got "
                    f"{', '.join(sorted(self._loaded))}: another version of the script has written it"
                )
            for name, (obj, per_rank) in list(self._objects.items()):
                self.register(name, obj, per_rank=per_rank)
        log.info("resuming after step %d, in %s", self.progress.step, self.progress.stage)

    def begin(self, stage: str) -> None:
        """Enter a stage of the episode, and save."""
        self.progress.begin(stage)
        self.save()

    def batch_done(self) -> None:
        """Call it after every batch of either stage: it saves when that is due, and ends the process after a stop signal."""
        self.progress.batches_done += 1
        self.progress.batches_seen += 1
        stopping = self._stop.asked(self.progress.batches_seen, self.world_size, self.device)
        if stopping or self.progress.batches_seen % self.save_every == 0:
            self.save()
        if stopping:
            log.info("stopped and saved; resume with: python %s --run-dir %s --resume", sys.argv[0], self.run_dir)
            self.metrics.close()
            sys.exit(0)

    def log_seconds(self, stage: str, start: float) -> None:
        """Log how long a stage of the episode has taken since `start`, for TensorBoard."""
        self.metrics.log_scalars("episode", {f"{stage}_seconds": time.time() - start}, self.progress.step)

    def finish(self) -> None:
        """Write the last checkpoint, close the metrics, and leave the process group."""
        self.save()
        self.metrics.close()
        self._stop.forget()
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def save_checkpoint(run_dir: Path, number: int, rank: int, world_size: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Write `shared` (equal on every rank; rank 0 writes it) and each rank's `own` to a new folder; then move the pointer.

    Until the pointer has moved, a resumed run finds the checkpoint before, complete.
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
    """(shared, own) of the last complete checkpoint, on the CPU, or None if the run ended before its first one.

    Nothing but tensors and plain values is unpickled.
    """
    if not (run_dir / POINTER).exists():
        return None
    pointer = json.loads((run_dir / POINTER).read_text(encoding="utf-8"))
    if pointer["world_size"] != world_size:
        raise SystemExit(
            f"--resume: the run in {run_dir} has {pointer['world_size']} processes, each with its share of the features, and "
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
    """The file is the old one or the new one, never half of it."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
