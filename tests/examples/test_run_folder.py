"""What the example scripts save and resume from: registered objects, and a metrics file without a line too many."""

import argparse
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_folder import RunState, open_run_dir, resumed_arguments

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


def open_elsewhere(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that opens a run folder, says which, and holds it until its input is closed."""
    examples = Path(__file__).parents[2] / "examples"
    code = (
        f"import sys; sys.path.insert(0, {str(examples)!r})\nimport argparse\nfrom pathlib import Path\n"
        "from run_folder import open_run_dir\nrun_dir = Path(sys.argv[1]) if sys.argv[1:] else None\n"
        "args = argparse.Namespace(run_dir=run_dir, resume='resume' in sys.argv, method='clip')\nsys.stdin.readline()\n"
        "print(open_run_dir(args, 0, 1), flush=True)\nsys.stdin.readline()"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_runs_that_start_together_have_a_folder_each(tmp_path: Path) -> None:
    processes = [open_elsewhere(tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    written = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert written == [str(Path("runs") / f"clip-{i}") for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("resume", [[], ["resume"]])
def test_a_run_folder_in_use_is_an_error_that_names_it(resume: list[str], tmp_path: Path) -> None:
    holder = open_elsewhere(tmp_path, "run")
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "run\n"
    other = open_elsewhere(tmp_path, "run", *resume)
    errors = other.communicate("\n", timeout=120)[1]
    assert other.returncode == 1
    assert "run is in use by another process" in errors
    holder.kill()
    holder.communicate()
    # A killed process holds no lock.
    assert open_elsewhere(tmp_path, "run", "resume").communicate("\n\n", timeout=120)[0] == "run\n"


@pytest.mark.parametrize("shards", ["pipe:touch hacked", "a.tar::pipe:touch hacked", "http://example.org/a'b.tar"])
def test_commands_come_from_the_command_line_alone(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "arguments.json").write_text(json.dumps({"shards": shards, "seed": 3}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards")
    parser.add_argument("--seed", type=int, default=0)
    monkeypatch.setattr(sys, "argv", ["train_stream.py"])
    with pytest.raises(SystemExit):
        resumed_arguments(parser, tmp_path, commands=["shards"])
    assert "--resume needs --shards again" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train_stream.py", "--shards", shards])
    assert vars(resumed_arguments(parser, tmp_path, commands=["shards"])) == {"shards": shards, "seed": 3}
    (tmp_path / "arguments.json").write_text(json.dumps({"shards": "x/{0..3}.tar", "seed": 3}))
    monkeypatch.setattr(sys, "argv", ["train_stream.py"])
    assert resumed_arguments(parser, tmp_path, commands=["shards"]).shards == "x/{0..3}.tar"


def test_the_log_takes_names_that_are_not_in_utf_8(tmp_path: Path) -> None:
    args = argparse.Namespace(run_dir=tmp_path / "run", resume=False, method="clip")
    before = list(logging.getLogger("train").handlers)
    open_run_dir(args, 0, 1)
    logging.getLogger("train").warning("dropped Bild\udce9.png")
    for handler in logging.getLogger("train").handlers[:]:
        if handler not in before:
            handler.close()
            logging.getLogger("train").removeHandler(handler)
    assert r"dropped Bild\udce9.png" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
