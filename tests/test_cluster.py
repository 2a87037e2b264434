"""The command ``python -m protoclip_losses.cluster``, as a process."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import seeded

from protoclip_losses import KMeans, KMeansResult

THINGS = ["red bus", "old bus", "black cat", "small cat", "tall tree", "green tree"]
# As ``python -m protoclip_losses.cluster``, which is killed before the state after the second iteration is written.
KILLED = """
import os, signal, runpy, sys
from protoclip_losses.clustering.checkpoint import Checkpoint
real = Checkpoint.write
def write(self, step, tensors):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, step, tensors)
Checkpoint.write = write
runpy.run_module("protoclip_losses.cluster", run_name="__main__", alter_sys=True)
"""
WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
runpy.run_module("protoclip_losses.cluster", run_name="__main__", alter_sys=True)
"""


def command(*arguments, script=None):
    start = ["-m", "protoclip_losses.cluster"] if script is None else ["-c", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture
def files(tmp_path):
    """Features in groups, with a caption each that names the group."""
    groups = torch.arange(600) % len(THINGS)
    x = 10 * torch.randn(len(THINGS), 4, generator=seeded(0))[groups] + torch.randn(600, 4, generator=seeded(1))
    np.save(tmp_path / "features.npy", x.half().numpy())
    (tmp_path / "captions.txt").write_text(
        "".join(f"a {THINGS[group]}\u2028 {i}\n" for i, group in enumerate(groups)), encoding="utf-8"
    )
    return tmp_path


def test_no_cluster_is_larger_than_asked(files):
    arguments = [files / "features.npy", "--num-clusters", 7, "--out", files / "out", "--quiet"]
    assert command(*arguments, "--max-cluster-size", 86).returncode == 0
    assert int(KMeansResult.load(files / "out" / "clusters").counts.max()) <= 86
    done = command(*arguments, "--max-cluster-size", 85)
    assert done.returncode == 1
    assert "max_cluster_size must be at least 86 for 600 finite rows in num_clusters=7 clusters, got 85" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_command_is_resumed_and_writes_its_results(files):
    out = files / "out" / "clusters"
    arguments = [files / "features.npy", "--num-clusters", 6, "--out", out, "--captions", files / "captions.txt", "--tol", 0]
    assert command(*arguments, script=KILLED).returncode == -signal.SIGKILL
    assert [file.name for file in out.iterdir()] == ["checkpoint"]
    refused = command(*arguments)
    assert refused.returncode == 2
    assert "is of a run that did not end: go on with --resume, or delete it" in refused.stderr
    done = command(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "K-means" in done.stderr  # a bar
    assert "objective" in done.stdout
    assert sorted(file.name for file in out.iterdir()) == ["captions.txt", "clusters", "report.json", "sizes.png"]

    expected = KMeans(6, tol=0).fit(torch.from_numpy(np.load(files / "features.npy")))
    result = KMeansResult.load(out / "clusters")
    assert torch.allclose(result.centroids, expected.centroids, atol=1e-5)
    assert torch.equal(result.labels, expected.labels)
    assert json.loads((out / "report.json").read_text())["iterations"] == len(expected.report.objectives)
    assert (out / "sizes.png").read_bytes().startswith(b"\x89PNG")
    lines = (out / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 6 * (1 + 5)
    sizes = []
    for start in range(0, len(lines), 6):
        cluster, size = (int(word) for word in lines[start].removeprefix("cluster ").removesuffix(" rows").split(":"))
        sizes.append(size)
        assert size == result.counts[cluster]
        rows = [int(line.split()[-1]) for line in lines[start + 1 : start + 6]]
        assert result.labels[rows].tolist() == [cluster] * 5
    assert sizes == sorted(sizes, reverse=True)


def test_captions_alone_are_clustered_by_their_words_and_no_picture_is_said(files):
    pytest.importorskip("sklearn")
    out = files / "words"
    arguments = ["--captions", files / "captions.txt", "--num-clusters", 6, "--out", out, "--dim", 6, "--quiet", "--samples", 600]
    done = command(*arguments, script=WITHOUT_MATPLOTLIB)
    assert done.returncode == 0, done.stderr
    assert "no picture of the sizes: this needs matplotlib" in done.stdout
    assert "K-means" not in done.stderr
    assert not (out / "sizes.png").exists()
    text = (out / "captions.txt").read_text(encoding="utf-8")
    assert text.count("bus") == 200
    assert len(KMeansResult.load(out / "clusters").labels) == 600


def test_what_is_missing_is_said(files, capsys):
    from protoclip_losses.cluster import main

    with pytest.raises(SystemExit):
        main(["--num-clusters", "3", "--out", str(files / "out")])
    assert "features or --captions must be given, got neither" in capsys.readouterr().err
    (files / "few.txt").write_text("one\n")
    with pytest.raises(SystemExit):
        main(
            [
                str(files / "features.npy"),
                "--captions",
                str(files / "few.txt"),
                "--num-clusters",
                "3",
                "--out",
                str(files / "out"),
            ]
        )
    assert "--captions must have a line for each of the 600 rows" in capsys.readouterr().err
