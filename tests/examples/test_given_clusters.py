"""train_cc3m.py with clusters that ``python -m protoclip_losses.cluster`` found before: no K-means of them in the run."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import TORCHRUN, assert_same_end, last_state, loss_states, records, run, run_until
from pair_files import jpeg
from pairs import emoji_pairs

from protoclip_losses import KMeans, KMeansResult

PAIRS, HELD_OUT = 230, 0.2
SETTINGS = ["--batch-size", "16", "--head-width", "32", "--projection-width", "16", "--held-out", str(HELD_OUT)]
SETTINGS += ["--workers", "1", "--log-every", "1", "--num-prototypes", "6", "--weight-proto", "0", "--lit-episodes", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, emoji = tmp_path_factory.mktemp("data"), emoji_pairs(40, styles=("twemoji",))
    for i in range(PAIRS):
        (folder / f"{i}.jpg").write_bytes(jpeg(emoji, 6 * i))
    (folder / "pairs.tsv").write_text("".join(f"{i}.jpg\t{emoji.captions[6 * i]}\n" for i in range(PAIRS)))
    return ["--train-data", str(folder / "pairs.tsv"), *SETTINGS]


@pytest.fixture(scope="module")
def captions(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The captions of the training pairs, in order, as a run writes them."""
    folder = tmp_path_factory.mktemp("first")
    run(*data, "--teacher", "none", "--episodes", "1", "--method", "clip", "--run-dir", str(folder))
    return folder / "train_captions.txt"


def cluster(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "protoclip_losses.cluster", *map(str, arguments), "--quiet"], check=True)


@pytest.fixture(scope="module")
def clusters(captions: Path) -> Path:
    """A folder of the command, of the words of the captions."""
    pytest.importorskip("sklearn")
    folder = captions.parent / "by_words"
    cluster("--captions", captions, "--num-clusters", 9, "--dim", 8, "--out", folder)
    return folder


def labels_of(run_dir: Path, teacher: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(samples, their labels) of the last episode."""
    state = loss_states(run_dir)[0]["_extra_state"]["prototypes"]
    return state["index"], state["clusterings"][teacher]["labels"]


@pytest.mark.parametrize("features", ["extracted", "training"])
def test_labels_are_those_of_the_file_and_no_k_means_runs(features: str, data: list[str], clusters: Path, tmp_path: Path) -> None:
    arguments = [*data, "--teacher", str(clusters), "--features", features, "--episodes", "3", "--episode-size", "120"]
    written = run(*arguments, "--run-dir", str(tmp_path / "run"))
    assert "clustering" not in written
    assert not list((tmp_path / "run").glob("*.clusters.pt"))
    used = [r["proto_external_loss"] > 0.3 for r in records(tmp_path / "run") if r["episode"] > 0]
    assert used
    assert all(used)
    index, labels = labels_of(tmp_path / "run", "by_words")
    wanted = KMeansResult.load(clusters).labels[index]
    assert torch.equal(labels[labels >= 0], wanted[labels >= 0])
    assert (labels >= 0).sum() > 100


def test_several_files_beside_the_words(data: list[str], captions: Path, clusters: Path, tmp_path: Path) -> None:
    """A folder, a file in it, and features that the run clusters itself."""
    rows = np.random.default_rng(0).normal(size=(len(KMeansResult.load(clusters).labels), 5)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    cluster(tmp_path / "rows.npy", "--num-clusters", 5, "--out", tmp_path / "random")
    teachers = [str(tmp_path / "random" / "clusters"), "words", str(clusters), str(tmp_path / "rows.npy")]
    arguments = ["--teacher", *teachers, "--teacher-width", "4", "--episodes", "2", "--weight-distill", "0.5"]
    written = run(*data, *arguments, "--run-dir", str(tmp_path / "run"))
    assert "once for all episodes" in written
    assert sorted(file.name for file in (tmp_path / "run").glob("*.clusters.pt")) == ["rows.clusters.pt", "words.clusters.pt"]
    for name, folder in (("clusters", tmp_path / "random"), ("by_words", clusters)):
        index, labels = labels_of(tmp_path / "run", name)
        assert torch.equal(labels, KMeansResult.load(folder).labels[index])
    assert all(r["distillation_loss"] > 0 for r in records(tmp_path / "run"))  # of those with features


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param((), id="one process"), pytest.param(TORCHRUN, id="two processes", marks=pytest.mark.distributed)],
)
def test_a_killed_run_ends_the_same_and_with_other_clusters_not_at_all(
    launcher: tuple[str, ...], data: list[str], captions: Path, clusters: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "clusters").write_bytes((clusters / "clusters").read_bytes())
    arguments = [*data, "--teacher", str(mine), "--features", "training", "--episodes", "4", "--episode-size", "120"]
    arguments += ["--batch-size", "8", "--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*arguments, "--run-dir", str(whole), launcher=launcher)
    how = {"launcher": launcher, "status": 1} if launcher else {}
    number = signal.SIGTERM if launcher else signal.SIGKILL
    run_until("episode 2/4 training: +[2-9]", number, 0.0, *arguments, "--run-dir", str(killed), **how)  # type: ignore[arg-type]
    assert last_state(killed)["progress"]["step"] < last_state(whole)["progress"]["step"]
    resume = ["--run-dir", str(killed), "--resume"]
    cluster("--captions", captions, "--num-clusters", 9, "--dim", 8, "--seed", 1, "--out", mine)
    written = run(*resume, launcher=launcher, status=1)
    assert "--teacher must be the clusters that the run began with, and these are others: mine" in " ".join(written.split())
    assert "training:" not in written
    (mine / "clusters").write_bytes((clusters / "clusters").read_bytes())
    run(*resume, launcher=launcher)
    assert_same_end(whole, killed)


def test_what_is_no_teacher_is_an_error_before_training(
    data: list[str], captions: Path, clusters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = captions.read_text(encoding="utf-8").count("\n")
    rows = torch.randn(lines, 3)
    KMeans(4).fit(rows[:-1]).save(tmp_path / "short")
    KMeans(4).fit(rows, index=torch.arange(lines)).save(tmp_path / "ids")
    KMeans(4).fit(rows).save(tmp_path / "image")
    (tmp_path / "text.txt").write_text("red bus\n" * lines)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "short.npy", rows[:-1].numpy())
    for number, (teachers, more, message) in enumerate(
        (
            (["nowhere"], [], "what python -m protoclip_losses.cluster wrote, got nowhere, which does not exist"),
            (["text.txt"], [], "got text.txt: text.txt must be a file of KMeansResult.save, got another kind of file"),
            (["empty"], [], "got empty: [Errno 2] No such file or directory: 'empty/clusters'"),
            (["short"], [], f"must have a label for each of the {lines} lines of"),
            (["words", "short.npy"], [], f"must have a row for each of the {lines} lines of"),
            (["ids"], [], f"got ids with {lines} labels and ids of their own"),
            (["image"], [], "must not be named like a modality, got image: rename"),
            ([clusters, clusters / "../by_words"], [], "must name each teacher once"),
            ([clusters], ["--method", "online"], "must have features with --method online, got clusters: by_words"),
            ([clusters], ["--weight-distill", "1"], "must have features with --weight-distill, got clusters: by_words"),
        )
    ):
        names = [str(name) for name in teachers]
        written = run(*data, "--teacher", *names, *more, "--run-dir", f"run{number}", status=1)
        assert message in " ".join(written.split())
        assert "Traceback" not in written
