"""The prototypes in a checkpoint of a Trainer of transformers, next to its own files, and the epoch it resumes at."""

import warnings
from pathlib import Path
from typing import Any

import torch

from ..distributed import active_group, gather_sizes, validate_on_all_ranks
from ..losses import ProtoLoss


def state_file(loss: ProtoLoss, folder: str | Path, args: Any) -> Path:
    """One file for all ranks with an episode's prototypes; in online mode each rank has a queue of its own."""
    ranks = "" if loss.needs_episodes else f"_{args.process_index}_of_{args.world_size}"
    return Path(folder) / f"proto_loss{ranks}.pt"


def save_state(loss: ProtoLoss, folder: str | Path, args: Any) -> None:
    """Write this rank's file."""
    if args.should_save or not loss.needs_episodes:
        file = state_file(loss, folder, args)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(loss.state_dict(), file)


def load_state(loss: ProtoLoss, folder: str | Path, args: Any) -> bool:
    """Load what was saved, on all ranks or on none: whether it was. Without the files of all, every rank starts anew.

    Raises:
        ValueError: a state of other settings, in online mode; also on the ranks whose own file is good.
    """
    group, file = active_group(None), state_file(loss, folder, args)
    found = gather_sizes(int(file.exists()), group)
    if not all(found):
        # A checkpoint of a plain Trainer has no prototypes, and needs none: an episode's are built when its epoch begins.
        if (any(found) or not loss.needs_episodes) and args.process_index == 0:
            missing = [rank for rank, n in enumerate(found) if not n]
            new = "prototypes are built anew" if loss.needs_episodes else "each begins with an empty queue, and with its warm-up"
            warnings.warn(f"{folder} has no {file.name} on process(es) {missing} of {args.world_size}: {new}", stacklevel=2)
        return False

    def read() -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not loss.needs_episodes:
            saved = ProtoLoss()
            saved.load_state_dict(state)
            assert saved.prototypes is not None
            assert loss.prototypes is not None
            loss.prototypes.load_state_dict(saved.prototypes.state_dict())  # raises if the settings are others
        loss.load_state_dict(state)

    validate_on_all_ranks(read, group)
    return True


def epoch_to_begin(args: Any, state: Any, loader: Any) -> tuple[int, bool]:
    """The epoch that training begins with, and whether in its middle.

    It is counted in steps, as ``state.epoch`` may have been made with another batch size.
    """
    steps = max(1, -(-len(loader) // args.gradient_accumulation_steps))
    epoch, done = divmod(state.global_step, steps)
    return epoch, done > 0
