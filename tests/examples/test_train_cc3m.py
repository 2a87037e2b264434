"""The example as its user runs it: in processes of its own, killed and resumed, on files that it did not ship."""

import json
import math
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from example_runs import (
    TORCHRUN,
    assert_clustering_is_in_tensorboard,
    assert_same_end,
    finish,
    holds_prototypes,
    last_state,
    loss_states,
    records,
    run,
    run_until,
    same,
    scalars,
    start,
)
from pair_files import jpeg, write_folder, write_shards, write_table
from pairs import Pairs, emoji_pairs

from protoclip_losses._checks import PAGE

TINY = ["--batch-size", "16", "--head-width", "32", "--projection-width", "16", "--held-out", "0.15", "--log-every", "1"]
TINY += ["--workers", "1", "--teacher", "none", "--num-prototypes", "6"]


@pytest.fixture(scope="module")
def emoji() -> Pairs:
    return emoji_pairs(40, styles=("twemoji",))


@pytest.fixture(scope="module")
def table(emoji: Pairs, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("table")
    lines = []
    for i in range(0, 1500, 6):
        (folder / f"{i}.jpg").write_bytes(jpeg(emoji, i))
        lines.append(f"{i}.jpg\t{emoji.captions[i]}\n")
    (folder / "pairs.tsv").write_text("".join(lines))
    return str(folder / "pairs.tsv")


def check_run_folder(run_dir: Path, columns: set[str]) -> dict[str, dict[str, float]]:
    for name in ("loss_curves.png", "map.png", "clusters.png"):
        data = (run_dir / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000, name
    assert list((run_dir / "tensorboard").glob("events.*"))
    rows: dict[str, dict[str, float]] = json.loads((run_dir / "table.json").read_text())
    assert next(iter(rows)) == "random encoder"
    assert len(rows) == 2
    for row in rows.values():
        assert set(row) == columns
        assert all(math.isfinite(value) for value in row.values())
    steps = [record["step"] for record in records(run_dir)]
    assert steps == sorted(set(steps))
    assert all(math.isfinite(value) for record in records(run_dir) for value in record.values())
    return rows


WITHOUT_LABELS = {"modality_gap"} | {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
WITH_LABELS = WITHOUT_LABELS | {"zero_shot_group", "zero_shot_subgroup", "linear_probe", "ari", "ami"}


def test_embedded_pairs_end_to_end(tmp_path: Path) -> None:
    written = run("--run-dir", str(tmp_path), "--episodes", "4", "--episode-size", "1024", "--log-every", "2", threads=2)
    rows = check_run_folder(tmp_path, WITH_LABELS)
    assert rows["trained, protoclip"]["zero_shot_group"] > rows["random encoder"]["zero_shot_group"] + 0.1
    assert (tmp_path / "table.txt").read_text().strip() in written
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")
    assert PAGE not in written  # nothing goes wrong
    for shown in (
        "extraction",
        "clustering 3,094 pairs by words, once",
        "clustering 1,024 pairs into 102 prototypes by image, text",
        "training",
        "batch/s",
    ):
        assert shown in written
    kinds = {(r["proto_loss"] > 0, r["proto_external_loss"] > 0, r["episode"]) for r in records(tmp_path)}
    assert kinds == {(False, False, 0), (True, True, 1), (True, True, 2), (False, False, 3)}
    assert len((tmp_path / "train_captions.txt").read_text(encoding="utf-8").splitlines()) == 3094


@pytest.mark.parametrize("form", ["shards", "table", "folder"])
def test_files_that_the_example_did_not_ship(form: str, emoji: Pairs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if form == "table":
        source, good = write_table(data, emoji, header=True)
    else:
        source, good = {"shards": write_shards, "folder": write_folder}[form](data, emoji)
    run_dir = tmp_path / "run"
    written = run("--train-data", source, "--run-dir", str(run_dir), *TINY, "--episodes", "3", "--workers", "2")
    check_run_folder(run_dir, WITHOUT_LABELS)
    broken = {"shards": 3, "table": 4, "folder": 2}[form]
    assert f"{len(good)} usable pairs, {broken} dropped (" in written
    assert written.count(" WARNING dropped ") == broken
    assert (run_dir / "log.txt").read_text().count(" WARNING dropped ") == broken


@pytest.mark.slow
def test_killed_in_each_stage_and_at_random_it_ends_with_the_same_weights(table: str, tmp_path: Path) -> None:
    arguments = ["--train-data", table, *TINY, "--batch-size", "8", "--episodes", "5", "--save-every", "2"]
    arguments += ["--lit-episodes", "0"]  # so that the last checkpoint holds prototypes
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*arguments, "--run-dir", str(whole))
    interruptions = [
        ("episode 2/5 extraction: +[1-9]", 0.0, signal.SIGTERM),
        ("episode 2/5 extraction: +[1-9]", 0.0, signal.SIGKILL),
        ("episode 3/5 extraction: +[1-9]", random.Random(1).uniform(0, 0.2), signal.SIGKILL),
        ("episode 3/5: clustering", 0.0, signal.SIGKILL),
        ("episode 3/5 training: +[1-9]", 0.0, signal.SIGKILL),
        ("episode 4/5 training", random.Random(0).uniform(0, 0.5), signal.SIGKILL),
        ("episode 5/5 extraction: +[1-9]", 0.0, signal.SIGINT),
    ]
    steps = last_state(whole)["progress"]["step"]
    for number, (pattern, delay, kind) in enumerate(interruptions):
        resume = ["--run-dir", str(killed), "--resume"] if number else [*arguments, "--run-dir", str(killed)]
        written = run_until(pattern, kind, delay, *resume)
        assert last_state(killed)["progress"]["step"] < steps
        assert number == 0 or "resuming after step" in written
    run("--run-dir", str(killed), "--resume")
    assert holds_prototypes(whole)
    assert_same_end(whole, killed)
    assert_clustering_is_in_tensorboard(whole, killed, builds=4)
    for stage, episodes in (("extraction", 4), ("clustering", 4), ("training", 5)):
        steps = [step for step, _ in scalars(whole, f"episode/{stage}_seconds")]
        assert len(steps) == episodes
        # What was done again after a kill is logged again, at the same step.
        assert sorted({step for step, _ in scalars(killed, f"episode/{stage}_seconds")}) == steps
    assert json.loads((whole / "table.json").read_text()) == json.loads((killed / "table.json").read_text())


REUSE = ["--teacher", "words", "--teacher-width", "8", "--features", "training", "--weight-proto", "0"]
REUSE += ["--external-target-temperature", "0.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param((), id="one process"), pytest.param(TORCHRUN, id="two processes", marks=pytest.mark.distributed)],
)
def test_features_of_training_reused_stopped_and_killed_it_ends_with_the_same_weights(
    launcher: tuple[str, ...], table: str, tmp_path: Path
) -> None:
    """Episodes of a part of the pairs: prototypes are of the episode before, labels of this one's samples."""
    arguments = ["--train-data", table, *TINY, *REUSE, "--labels-per-sample", "2", "--weight-distill", "0.5"]
    arguments += ["--batch-size", "8", "--episode-size", "120", "--episodes", "5", "--lit-episodes", "0", "--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    written = run(*arguments, "--run-dir", str(whole), launcher=launcher)
    assert "extraction" not in written
    interruptions = [
        ("episode 1/5 training: +[2-9][0-9]%", signal.SIGKILL),  # in warm-up, features are collected
        ("episode 2/5 training: +[1-9]", signal.SIGTERM),
        ("episode 4/5 training: +[1-9]", signal.SIGKILL),
    ]
    for number, (pattern, kind) in enumerate(interruptions):
        resume = ["--resume"] if number else arguments
        how: dict[str, Any] = {"launcher": launcher, "status": 1} if launcher else {}
        run_until(pattern, signal.SIGTERM if launcher else kind, 0.0, *resume, "--run-dir", str(killed), **how)
        assert last_state(killed)["progress"]["step"] < last_state(whole)["progress"]["step"]
    run("--run-dir", str(killed), "--resume", launcher=launcher)
    assert_same_end(whole, killed)
    used = {(r["proto_external_loss"] > 0, r["distillation_loss"] > 0) for r in records(whole) if r["episode"] > 0}
    assert used == {(True, True)}
    assert {r["proto_external_loss"] for r in records(whole) if r["episode"] == 0} == {0.0}


def test_several_teachers_and_what_cannot_go_together(table: str, tmp_path: Path) -> None:
    two = ["--train-data", table, *TINY, "--episodes", "3", "--teacher", "words", "minilm", "--teacher-width", "8"]
    written = run(*two, "--teacher-clusters", "episode", "--run-dir", str(tmp_path / "two"))
    assert "by image, text, words, minilm" in written
    for arguments, status, message in (
        (["--teacher", "none", "words"], 2, "--teacher must be none or name teachers, got none words"),
        (["--teacher", "words", "words"], 1, "--teacher must name each teacher once"),
        (["--features", "training"], 2, "--features training needs teachers that are clustered once"),
        (["--labels-per-sample", "9999"], 1, "--labels-per-sample must be at most"),
    ):
        written = run(*two[:2], *TINY, *arguments, "--run-dir", str(tmp_path / f"bad{arguments}"), status=status)
        assert message in " ".join(written.split())


ONLINE = ["--method", "online", "--queue-size", "60", "--renew-every", "3", "--lit-episodes", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param((), id="one process"), pytest.param(TORCHRUN, id="two processes", marks=pytest.mark.distributed)],
)
def test_online_mode_stopped_and_killed_ends_with_the_same_weights(launcher: tuple[str, ...], table: str, tmp_path: Path) -> None:
    arguments = ["--train-data", table, *TINY, *ONLINE, "--episodes", "5", "--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    written = run(*arguments, "--run-dir", str(whole), launcher=launcher)
    assert "extraction" not in written
    interruptions = [
        ("episode 1/5 training: +[2-5][0-9]%", signal.SIGKILL),  # the queue fills
        ("episode 3/5 training: +[4-9]", signal.SIGTERM),  # between two sets of prototypes
        ("episode 4/5 training: +[1-9]", signal.SIGKILL),
    ]
    for number, (pattern, kind) in enumerate(interruptions):
        resume = ["--resume"] if number else arguments
        # torchrun passes SIGTERM on, and then ends with 1; a SIGKILL would leave its processes running.
        how: dict[str, Any] = {"launcher": launcher, "status": 1} if launcher else {}
        run_until(pattern, signal.SIGTERM if launcher else kind, 0.0, *resume, "--run-dir", str(killed), **how)
        assert last_state(killed)["progress"]["step"] < last_state(whole)["progress"]["step"]
    run("--run-dir", str(killed), "--resume", launcher=launcher)
    assert holds_prototypes(whole)
    assert_same_end(whole, killed)
    assert {record["proto_loss"] > 0 for record in records(whole) if record["episode"] > 0} == {True}
    assert {record["proto_loss"] for record in records(whole) if record["episode"] == 0} == {0.0}
    if launcher:
        first, second = (state["_extra_state"]["prototypes"] for state in loss_states(whole))
        assert not same(first["queue"], second["queue"])
        assert same(first["terms"], second["terms"])


@pytest.mark.slow
def test_online_mode_from_warm_up_to_lit_with_a_teacher(table: str, tmp_path: Path) -> None:
    import numpy as np

    arguments = ["--train-data", table, *TINY, "--method", "online", "--episodes", "4"]
    run(*arguments[:2], *TINY, "--method", "clip", "--episodes", "1", "--run-dir", str(tmp_path / "captions"))
    captions = (tmp_path / "captions" / "train_captions.txt").read_text(encoding="utf-8").splitlines()
    rows = np.stack([np.bincount([ord(c) % 32 for c in caption], minlength=32) for caption in captions])
    np.save(tmp_path / "letters.npy", rows.astype(np.float32))
    run(*arguments, "--run-dir", str(tmp_path / "run"), "--teacher", str(tmp_path / "letters.npy"), "--teacher-width", "8")
    check_run_folder(tmp_path / "run", WITHOUT_LABELS)
    kinds = {(r["proto_loss"] > 0, r["proto_external_loss"] > 0, r["episode"]) for r in records(tmp_path / "run")}
    assert kinds == {(False, False, 0), (True, True, 1), (True, True, 2), (False, False, 3)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_all_processes_saves_and_stops(number: signal.Signals, table: str, tmp_path: Path) -> None:
    arguments = ["--train-data", table, "--run-dir", str(tmp_path / "run"), *TINY, "--episodes", "40", "--save-every", "1000"]
    written = run_until("episode 2/40 training: +[1-9]", number, 0.0, *arguments)
    assert "stopped and saved; resume with: python" in written
    step = last_state(tmp_path / "run")["progress"]["step"]
    assert 13 < step < 400
    assert records(tmp_path / "run")[-1]["step"] == step


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_does(table: str, tmp_path: Path) -> None:
    arguments = ["--train-data", table, *TINY, "--episodes", "3", "--head-norm", "layer", "--save-every", "3"]
    run(*arguments, "--run-dir", str(tmp_path / "one"))
    run(*arguments, "--run-dir", str(tmp_path / "two"), launcher=TORCHRUN)
    check_run_folder(tmp_path / "two", WITHOUT_LABELS)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    # The same samples, gradients and steps: in the warm-up nothing differs but the order of float32 sums. After it K-means
    # starts from other rows, as each process brings its own: other clusters, as good as those.
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if a["episode"] == 0 else 0.05)
    written = run("--run-dir", str(tmp_path / "two"), "--resume", status=1)
    assert "has 2 processes" in written


def test_plain_clip_needs_neither_prototypes_nor_teacher(table: str, tmp_path: Path) -> None:
    written = run("--train-data", table, "--run-dir", str(tmp_path), *TINY, "--episodes", "2", "--method", "clip")
    rows = check_run_folder(tmp_path, WITHOUT_LABELS)
    assert list(rows) == ["random encoder", "trained, clip"]
    assert "clustering" not in written
    assert {record["proto_loss"] for record in records(tmp_path)} == {0.0}


@pytest.mark.slow
def test_a_teacher_file_has_a_row_per_training_pair(table: str, tmp_path: Path) -> None:
    import numpy as np

    wrong, right = tmp_path / "wrong.npy", tmp_path / "right.npy"
    np.save(wrong, np.zeros((7, 8), np.float32))
    arguments = ["--train-data", table, *TINY, "--episodes", "3"]
    written = run(*arguments, "--run-dir", str(tmp_path / "a"), "--teacher", str(wrong), status=1)
    assert "wrong.npy with 7 rows" in written
    captions = (tmp_path / "a" / "train_captions.txt").read_text(encoding="utf-8").splitlines()
    rows = np.stack([np.bincount([ord(c) % 32 for c in caption], minlength=32) for caption in captions])
    np.save(right, rows.astype(np.float16))
    written = run(*arguments, "--run-dir", str(tmp_path / "b"), "--teacher", str(right), "--teacher-width", "8")
    assert "pairs by right, once for all episodes" in written
    hard = next(record for record in records(tmp_path / "b") if record["proto_external_loss"] > 0)
    soft_targets = ["--external-target-temperature", "1"]
    run(*arguments, "--run-dir", str(tmp_path / "c"), "--teacher", str(right), "--teacher-width", "8", *soft_targets)
    soft = next(record for record in records(tmp_path / "c") if record["proto_external_loss"] > 0)
    # The first step with prototypes: the same features and clusters, other targets.
    assert (soft["step"], soft["contrastive_loss"]) == (hard["step"], hard["contrastive_loss"])
    assert soft["proto_external_loss"] != hard["proto_external_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prototypes", "9999"], "--num-prototypes must be at most the .* pairs of an episode, got 9999"),
        (["--queue-size", "5"], "--queue-size must be at least the 6 prototypes, got 5"),
        (["--episode-size", "9999"], "--episode-size must be at most the .* training pairs, got 9999"),
        (["--batch-size", "9999"], "--batch-size must be at most the .* pairs of an episode, got 9999"),
        (["--teacher", "nowhere.npy"], "--teacher must be words, minilm, none, .* got nowhere.npy, which does not exist"),
        (["--model", "RN50"], "pip install open_clip_torch|train"),
        (["--precision", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--resume"], "is not the folder of a run"),
        (["--held-out", "1.5"], "share between 0 and 1"),
    ],
)
def test_a_wrong_argument_says_what_is_wanted(arguments: list[str], message: str, table: str, tmp_path: Path) -> None:
    if arguments[0] == "--model":
        try:
            import open_clip  # noqa: F401

            pytest.skip("open_clip is installed")
        except ImportError:
            pass
    process = start("--train-data", table, "--run-dir", str(tmp_path / "run"), *TINY, *arguments)
    written = finish(process)
    assert process.returncode in (1, 2)
    assert re.search(message, written), written[-2000:]
    assert "Traceback" not in written


@pytest.mark.slow
def test_bfloat16_on_a_cpu(table: str, tmp_path: Path) -> None:
    """Pictures are augmented in float32; encoders and heads run under autocast, in extraction too."""
    arguments = ["--train-data", table, *TINY, "--episodes", "2", "--lit-episodes", "0", "--precision", "bf16"]
    run(*arguments, "--run-dir", str(tmp_path))
    check_run_folder(tmp_path, WITHOUT_LABELS)
    assert records(tmp_path)[-1]["proto_loss"] > 0
