"""Online mode under open_clip's trainer: settings from the trainer's own, and state saved with the trainer's checkpoints."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ...distributed import active_group, gather_sizes, validate_on_all_ranks
from ...losses import ProtoLoss
from ...prototypes import OnlinePrototypes


def online_prototypes(options: argparse.Namespace, loader: Any, args: Any) -> OnlinePrototypes:
    """Online prototypes by the options; what they leave open follows from the sizes of a step and of an epoch."""
    samples = args.batch_size * args.accum_freq * args.world_size  # of a step
    steps = loader.num_batches // args.accum_freq  # of an epoch
    number = options.proto_num_prototypes or max(1, min(20_000, loader.num_samples // 10))
    queue_size = options.proto_queue_size or 10 * number
    every = options.proto_every or max(1, queue_size // samples)
    # At least the steps that yield a sample for each prototype.
    warmup = options.proto_warmup_steps or max(options.proto_warmup_epochs * steps, -(-number // samples))
    settings = {"calls_per_step": args.accum_freq, "niter": options.proto_niter, "seed": args.seed}
    return OnlinePrototypes(number, queue_size, every, warmup, **settings)


def _file(folder: Path, epoch: int, args: Any) -> Path:
    # Not .pt: open_clip's --resume latest takes the last of those for its own.
    return folder / f"epoch_{epoch}.online_{args.rank}_of_{args.world_size}"


def save_state(loss: ProtoLoss, epoch: int, args: Any) -> None:
    """Write this rank's state after ``epoch`` epochs next to open_clip's checkpoints; delete states whose checkpoint is gone.

    open_clip writes its checkpoint on the first rank, after this: the previous epoch's state stays, for a run killed in between.
    What one rank cannot write is an error on all, which would wait for it at open_clip's barrier.
    """
    if not args.logs or args.logs.lower() == "none":
        return
    folder = Path(args.checkpoint_path)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = _file(folder, epoch, args)
        partial = file.with_name(f"{file.name}.partial")
        torch.save(loss.get_extra_state(), partial)
        os.replace(partial, file)
        for old in range(1, epoch - 1):
            if not (folder / f"epoch_{old}.pt").exists():
                _file(folder, old, args).unlink(missing_ok=True)

    validate_on_all_ranks(write, active_group(None))


def load_state(loss: ProtoLoss, epoch: int, args: Any) -> None:
    """Resume from the state that was saved with the checkpoint; unless every rank has one, all start with an empty queue.

    Raises:
        ValueError: a state of other settings, or of another step than those of other ranks; on all ranks if on one.
    """
    if not args.resume or not epoch:
        return
    file = _file(Path(args.resume).parent, epoch, args)
    group = active_group(None)
    if not all(gather_sizes(int(validate_on_all_ranks(file.exists, group)), group)):
        logging.warning(f"No {file} on every process: the queue begins empty, and prototypes after its warm-up")
        return
    online = loss.prototypes
    assert isinstance(online, OnlinePrototypes)  # the launcher has set those of its options

    def load() -> Any:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises of many kinds
            raise ValueError(f"--resume: {file} must hold the state of a queue, and cannot be read: {error}") from error
        online.load_state_dict(state.get("prototypes") or state["online"])
        return state

    # Ranks whose steps differ would cluster at different times, and wait for each other.
    state = validate_on_all_ranks(load, group, lambda: {"the step of the queue": online.step, "prototypes": online.version})
    loss.set_extra_state(state)
