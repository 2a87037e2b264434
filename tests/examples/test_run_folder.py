"""What the example scripts save and resume from: registered objects, and a metrics file without a line too many."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_folder import RunState

from protoclip_losses import EpisodeSampler


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A RunState listens to signals; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def new_state(folder: Path, save_every: int = 2) -> RunState:
    return RunState(folder, 0, 1, torch.device("cpu"), save_every)


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(state: RunState, steps: int) -> None:
    for _ in range(steps):
        state.progress.step += 1
        state.metrics.write(state.progress.step, 0, 0.1, {"loss": torch.rand(())})
        state.batch_done()


def test_an_object_is_restored_whether_it_is_registered_before_or_after_the_checkpoint_is_read(tmp_path: Path) -> None:
    state, model, bank = new_state(tmp_path), torch.nn.Linear(2, 2), torch.nn.Linear(3, 1)
    state.register("model", model)
    state.register("bank", bank, per_rank=True)
    state.begin("training")
    folder = tmp_path / json.loads((tmp_path / "checkpoint.json").read_text())["folder"]
    saved = {part: torch.load(folder / f"{part}.pt", weights_only=True).keys() for part in ("shared", "rank0")}
    assert saved == {"shared": {"progress", "metrics", "model"}, "rank0": {"random", "bank"}}

    resumed, early, late = new_state(tmp_path), torch.nn.Linear(2, 2), torch.nn.Linear(3, 1)
    resumed.register("model", early)
    resumed.load()
    assert torch.equal(early.weight, model.weight)
    assert resumed.progress.stage == "training"
    resumed.register("bank", late, per_rank=True)
    assert torch.equal(late.weight, bank.weight)
    # Its state is given out once: the bank of the next episode is a new one.
    resumed.unregister("bank")
    another = torch.nn.Linear(3, 1)
    resumed.register("bank", another, per_rank=True)
    assert not torch.equal(another.weight, bank.weight)


def test_a_checkpoint_is_written_every_few_batches_and_the_one_before_is_removed(tmp_path: Path) -> None:
    state = new_state(tmp_path, save_every=2)
    train(state, 1)
    assert not (tmp_path / "checkpoint.json").exists()
    train(state, 4)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
    resumed = new_state(tmp_path)
    resumed.load()
    assert (resumed.progress.step, resumed.progress.batches_done, resumed.progress.saves) == (4, 4, 2)


def test_a_stop_signal_saves_after_the_batch_and_ends_the_process(tmp_path: Path) -> None:
    state = new_state(tmp_path, save_every=1000)
    train(state, 3)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(state, 3)
    assert stopped.value.code == 0
    assert lines(tmp_path) == [1, 2, 3, 4]
    resumed = new_state(tmp_path)
    resumed.load()
    assert resumed.progress.step == 4


def test_random_numbers_continue(tmp_path: Path) -> None:
    new_state(tmp_path).begin("training")
    expected = torch.rand(3)
    new_state(tmp_path).load()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kept", [0, 4])
def test_lines_after_the_checkpoint_are_written_again(kept: int, tmp_path: Path) -> None:
    """Also where a resumed run saves before it writes a line, and is killed a second time."""
    state = new_state(tmp_path, save_every=4 if kept else 1000)
    train(state, 7)
    state.metrics.close()  # what a killed process has written may be on disk
    assert lines(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    for _ in range(2):
        resumed = new_state(tmp_path)
        resumed.load()
        assert resumed.progress.step == kept
        resumed.save()
        assert lines(tmp_path) == list(range(1, kept + 1))
    train(resumed, 3)
    resumed.finish()
    assert lines(tmp_path) == list(range(1, kept + 4))


def test_what_does_not_fit_says_so(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    state.register("sampler", EpisodeSampler(10, 4))
    state.save()
    other = new_state(tmp_path)
    other.register("sampler", EpisodeSampler(9, 4))
    with pytest.raises(SystemExit, match=r"'sampler' of the checkpoint does not fit this run: .*dataset_size=10"):
        other.load()
    other = new_state(tmp_path)
    other.register("teacher", torch.nn.Linear(1, 1))
    with pytest.raises(SystemExit, match="must hold teacher, got metrics, progress, random, sampler"):
        other.load()
