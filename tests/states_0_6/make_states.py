"""Makes the states in this folder. It runs against 0.6.0, commit 801b0d4, and nothing newer::

    git worktree add ../protoclip-losses-0.6 801b0d4
    cd tests
    PYTHONPATH=../../protoclip-losses-0.6 python -m states_0_6.make_states

Hosts that are installed (transformers with accelerate, Lightning) write their files as well; open_clip's needs no host. Each
state is a file NAME.pt, written by ``torch.save`` as a user of 0.6 would; NAME.facts.pt is what 0.6 does from there, see
``objects.py``.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import protoclip_losses

from .objects import STATES, next_steps, online_loss, steps

FOLDER = Path(__file__).parent


def save(name: str, state: Any, facts: dict[str, Any]) -> None:
    torch.save(state, FOLDER / f"{name}.pt")
    torch.save(facts, FOLDER / f"{name}.facts.pt")


def library() -> None:
    for saved in STATES:
        torch.manual_seed(0)
        before = saved.make()
        saved.advance(before)
        path = FOLDER / f"{saved.name}.pt"
        torch.save(before.state_dict(), path)
        after = saved.make()
        after.load_state_dict(torch.load(path, weights_only=True))
        save(saved.name, torch.load(path, weights_only=True), saved.behaviour(after))


def open_clip() -> None:
    """What the launcher writes beside open_clip's checkpoints in online mode."""
    from protoclip_losses.integrations.open_clip_online import save_state

    loss = online_loss()
    steps(loss, 8)
    with tempfile.TemporaryDirectory() as folder:
        save_state(loss, 1, SimpleNamespace(logs=folder, checkpoint_path=folder, rank=0, world_size=1))
        state = torch.load(Path(folder) / "epoch_1.online_0_of_1", weights_only=True)
    save("host_open_clip_online", state, next_steps(loss))


def lightning() -> None:
    from protoclip_losses.integrations.lightning import ProtoCLIPCallback

    callback = ProtoCLIPCallback(4)
    callback.epoch = 3
    save("host_lightning", callback.state_dict(), {"epoch": 3})


def transformers() -> None:
    """The file beside the model in a checkpoint in the middle of the second epoch, of an episodic and of an online run."""
    from .small_trainer import facts, trainer

    for online, file in ((False, "proto_loss.pt"), (True, "proto_loss_0_of_1.pt")):
        with tempfile.TemporaryDirectory() as folder:
            run = trainer(Path(folder), online)
            run.train()
            state = torch.load(Path(folder) / "checkpoint-3" / file, weights_only=True)
        run.loss.load_state_dict(state)
        save("host_transformers_online" if online else "host_transformers", state, facts(run.loss))


if __name__ == "__main__":
    if protoclip_losses.__version__ != "0.6.0":
        raise SystemExit(f"these states are those of 0.6.0, and protoclip_losses is {protoclip_losses.__version__}")
    torch.set_num_threads(1)
    library()
    open_clip()
    for needed, write in (("lightning", lightning), ("accelerate", transformers)):
        if find_spec(needed):
            write()
        else:
            print(f"{needed} is not installed: the states of {write.__name__} stay as they are")
