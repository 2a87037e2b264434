"""A fit that is killed goes on where it was, to the same bits."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import seeded

from protoclip_losses import KMeans
from protoclip_losses.clustering import checkpoint as checkpoint_module
from protoclip_losses.clustering.checkpoint import Checkpoint

SCRIPT = """
import os, signal, sys
import numpy as np, torch
from protoclip_losses import KMeans
from protoclip_losses.clustering.checkpoint import Checkpoint

torch.set_num_threads(1)
folder, writes, settings = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
real = Checkpoint.write

def write(self, step, tensors):
    global writes
    if writes == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    writes -= 1
    real(self, step, tensors)

Checkpoint.write = write
x = np.load(f"{folder}/x.npy", mmap_mode="r")
KMeans(60, **settings).fit(x, checkpoint=f"{folder}/state").save(f"{folder}/result")
"""


@pytest.fixture
def x(tmp_path):
    centers = torch.randn(40, 6, generator=seeded(0))
    x = centers[torch.randint(40, (1200,), generator=seeded(1))] + 0.4 * torch.randn(1200, 6, generator=seeded(2))
    np.save(tmp_path / "x.npy", x.numpy())
    return x


def run(folder, writes, settings):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(writes), repr(settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
@pytest.mark.parametrize(
    ("settings", "writes"),
    [({"tol": 0, "spherical": True}, 4), ({"tol": 0, "nredo": 2, "niter": 5}, 9)],
    ids=["iterations", "second_run"],
)
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path, x, settings, writes):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = KMeans(60, **settings).fit(np.load(tmp_path / "x.npy"))
    torch.set_num_threads(threads)
    killed = run(tmp_path, writes, settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "state").exists()
    found, _ = checkpoint_module.read_tensors(tmp_path / "state", checkpoint_module.KIND)
    iterations = len(found["objectives_and_reseeded"]) - 1
    assert int(found["run"]) * (settings.get("niter", 20) + 1) + iterations == writes - 1
    done = run(tmp_path, -1, settings)
    assert done.returncode == 0, done.stderr
    result = type(whole).load(tmp_path / "result")
    assert torch.equal(result.centroids, whole.centroids)
    assert torch.equal(result.labels, whole.labels)
    assert result.report.objectives == whole.report.objectives
    assert result.report.reseeded == whole.report.reseeded
    assert sorted(os.listdir(tmp_path)) == ["result", "x.npy"]  # the state goes when it is not needed


class Stop(Exception):
    pass


@pytest.fixture
def stopped(tmp_path, x, monkeypatch):
    """The path of the state after the second iteration."""
    real = Checkpoint.write

    def write(self, step, tensors):
        real(self, step, tensors)
        if step == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", write)
        with pytest.raises(Stop):
            KMeans(30).fit(x, checkpoint=tmp_path / "state")
    return tmp_path / "state"


def test_what_was_done_is_not_done_again(stopped, x, monkeypatch):
    seen = []
    real = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, step, tensors: (seen.append(step), real(self, step, tensors)))
    result = KMeans(30).fit(x, checkpoint=stopped)
    assert seen == list(range(3, len(result.report.objectives) + 1))
    assert torch.equal(result.centroids, KMeans(30).fit(x).centroids)


@pytest.mark.parametrize(
    ("settings", "change", "arguments", "message"),
    [
        ({"seed": 1}, None, {}, "seed: 0, now 1"),
        ({"niter": 7}, None, {}, "niter: 20, now 7"),
        ({"spherical": True}, None, {}, "spherical: False, now True"),
        ({}, lambda x: x.index_fill(0, torch.tensor([3]), 0.5), {}, "checksum of x: "),
        ({}, lambda x: x[:-1], {}, r"shape of x: \(1200, 6\), now \(1199, 6\)"),
        ({}, lambda x: x.double(), {}, None),  # the same rows
        ({}, lambda x: x.numpy(), {}, None),
        ({}, None, {"init": torch.ones(30, 6)}, "checksum of init: none, now "),
        ({}, None, {"weights": torch.ones(1200)}, "checksum of weights: none, now "),
        ({}, None, {"index": torch.arange(1200).flip(0)}, "checksum of the order by index: "),
    ],
)
def test_other_data_or_settings_are_named(stopped, x, settings, change, arguments, message):
    rows = x if change is None else change(x)
    if message is None:
        assert torch.equal(KMeans(30).fit(rows, checkpoint=stopped).labels, KMeans(30).fit(x).labels)
        return
    with pytest.raises(ValueError, match="checkpoint must be of the same data and settings, got .*state with .*" + message):
        KMeans(30, **settings).fit(rows, checkpoint=stopped, **arguments)
    with pytest.raises(ValueError, match="num_clusters: 30, now 31"):
        KMeans(31).fit(x, checkpoint=stopped)
    assert stopped.exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path, x):
    path = tmp_path / "state"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"state must be a file of KMeans.fit\(checkpoint=...\), got another kind of file"):
        KMeans(30).fit(x, checkpoint=path)
    KMeans(30).fit(x).save(path)
    with pytest.raises(ValueError, match=r"got one of KMeansResult.save"):
        KMeans(30).fit(x, checkpoint=path)
    path.unlink()
    (tmp_path / "state.rank0of2.1").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint must be of 1 processes as there are now, got state.rank0of2.1 of another"):
        KMeans(30).fit(x, checkpoint=path)


def test_a_kill_while_the_state_is_written_leaves_the_one_before(stopped, monkeypatch):
    before = stopped.read_bytes()

    def stop(number):
        raise Stop

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(Stop):
        Checkpoint(stopped, {}, None).write(9, {"x": torch.ones(9)})
    assert stopped.read_bytes() == before


def test_faiss_has_no_checkpoint(tmp_path, x):
    with pytest.raises(ValueError, match="checkpoint must be None for backend='faiss'"):
        KMeans(3, backend="faiss").fit(x, checkpoint=tmp_path / "state")
