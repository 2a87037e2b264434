"""A result in one file, read by another process; weights of rows; progress."""

import builtins
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import seeded

from protoclip_losses import KMeans, KMeansResult
from protoclip_losses.clustering.files import read_tensors, write_tensors


def rows(count=300, width=5, seed=0):
    return torch.randn(count, width, generator=seeded(seed))


READ = """
import json, sys
import numpy as np
from protoclip_losses import KMeansResult
result = KMeansResult.load(sys.argv[1])
x = np.load(sys.argv[2], mmap_mode="r")
print(json.dumps({
    "labels": result.labels.tolist(), "index": None if result.index is None else result.index.tolist(),
    "centroids": result.centroids.double().tolist(), "counts": result.counts.tolist(), "objective": result.objective,
    "spherical": result.spherical, "report": result.report.scalars(), "objectives": list(result.report.objectives),
    "predicted": result.predict(x).tolist(), "several": result.predict(x, 3).tolist(), "repr": repr(result),
}))
"""


@pytest.mark.parametrize("name", ["clusters", "a.b.npz"])
def test_another_process_reads_everything(tmp_path, name):
    x = rows()
    x[4] = torch.nan
    index = torch.randperm(300, generator=seeded(2)) + 10**12
    spherical = name == "a.b.npz"
    result = KMeans(20, spherical=spherical).fit(x, index=None if name == "clusters" else index)
    result.save(tmp_path / name)
    np.save(tmp_path / "new.npy", rows(50, seed=1).numpy())
    command = [sys.executable, "-c", READ, str(tmp_path / name), str(tmp_path / "new.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "new.npy"])  # no suffix, nothing beside it
    assert read["labels"] == result.labels.tolist()
    assert read["labels"][4] == -1
    assert read["index"] == (None if name == "clusters" else index.tolist())
    assert torch.equal(torch.tensor(read["centroids"], dtype=torch.float64), result.centroids.double())
    assert read["counts"] == result.counts.tolist()
    assert (read["objective"], read["spherical"], read["repr"]) == (result.objective, spherical, repr(result))
    assert read["report"] == result.report.scalars()
    assert tuple(read["objectives"]) == result.report.objectives
    assert read["predicted"] == result.predict(rows(50, seed=1)).tolist()
    assert read["several"] == result.predict(rows(50, seed=1), 3).tolist()


def test_the_file_is_a_safetensors_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    result = KMeans(20).fit(rows(), index=torch.arange(300))
    result.save(tmp_path / "clusters.safetensors")
    tensors = safetensors.load_file(tmp_path / "clusters.safetensors")
    assert {name: x.dtype for name, x in tensors.items()} == {
        "centroids": torch.float32, "labels": torch.int64, "counts": torch.int64, "index": torch.int64
    }  # fmt: skip
    assert torch.equal(tensors["labels"], result.labels)


def test_labels_that_were_loaded_may_be_changed_and_saved_again(tmp_path):
    path = tmp_path / "clusters"
    result = KMeans(20).fit(rows())
    result.save(path)
    loaded = KMeansResult.load(path)
    loaded.labels[0] = 7
    assert torch.equal(KMeansResult.load(path).labels, result.labels)  # the file is as it was
    loaded.save(path)
    assert KMeansResult.load(path).labels[0] == 7
    assert torch.equal(loaded.labels[1:], result.labels[1:])


def test_tensors_of_any_shape_and_order_survive(tmp_path):
    tensors = {
        "bools": torch.tensor([True, False, True]), "half": torch.randn(3, 5).half(), "none": torch.empty(0, 4),
        "number": torch.tensor(3), "wide": torch.randn(7, dtype=torch.float64), "turned": torch.randn(3, 4).T,
    }  # fmt: skip
    write_tensors(tmp_path / "file", tensors, {"kind": "test", "format": 1, "é": [1.5, "x"]})
    found, facts = read_tensors(tmp_path / "file", "test")
    assert facts == {"kind": "test", "format": 1, "é": [1.5, "x"]}
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)


def test_the_folder_of_the_command_is_read_too(tmp_path):
    result = KMeans(20).fit(rows())
    result.save(tmp_path / "clusters")
    for path in (tmp_path, str(tmp_path), tmp_path / "clusters"):
        assert torch.equal(KMeansResult.load(path).labels, result.labels)
    with pytest.raises(FileNotFoundError, match="clusters"):
        KMeansResult.load(tmp_path.parent)


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "clusters"
    with pytest.raises(FileNotFoundError, match="clusters"):
        KMeansResult.load(path)
    result = KMeans(20).fit(rows())
    result.save(path)
    content = path.read_bytes()
    for broken, message in [
        (b"", "must be a file of KMeansResult.save, got another kind of file"),
        (b"\x93NUMPY" + bytes(200), "must be a file of KMeansResult.save, got another kind of file"),
        (content[:40], "must be a file of KMeansResult.save, got another kind of file"),
        (content[:-1], f"must have {len(content)} bytes, got {len(content) - 1}: it is cut short"),
        (content.replace(b'"format": "1"', b'"format": "2"'), "must have format 1, got 2: it needs a newer protoclip-losses"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            KMeansResult.load(path)


# --- weights -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("niter", [1, 20])
def test_integer_weights_are_repeated_rows(spherical, niter):
    x = rows(400)
    weights = torch.randint(1, 5, (400,), generator=seeded(1))
    init = x[:25].clone()
    kmeans = KMeans(25, tol=0, niter=niter, spherical=spherical)
    weighted, repeated = kmeans.fit(x, init=init, weights=weights), kmeans.fit(x.repeat_interleave(weights, 0), init=init)
    assert torch.allclose(weighted.centroids, repeated.centroids, atol=1e-5)
    assert torch.equal(weighted.labels.repeat_interleave(weights), repeated.labels)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-5)
    assert weighted.report.objectives == pytest.approx(repeated.report.objectives, rel=1e-5)
    assert weighted.counts.sum() == 400
    assert not torch.allclose(kmeans.fit(x, init=init).centroids, weighted.centroids, atol=1e-3)


def test_weights_draw_the_first_centroids():
    """Two groups of equal size, one with all the weight: it gets the centroids."""
    x = torch.cat([rows(200, 2), rows(200, 2, 1) + 100])
    weights = torch.ones(400)
    weights[:200] = 1e9
    for arguments, least in (({"weights": weights}, 19), ({}, 0)):
        result = KMeans(20, niter=1).fit(x, **arguments)
        near = int((result.centroids[:, 0] < 50).sum())
        assert near >= least
        assert arguments or near < 19


def test_weights_go_with_rows_that_are_read_in_blocks_and_with_those_that_are_left_out():
    x, weights = rows(400), torch.rand(400, generator=seeded(1)) + 0.1
    x[3] = torch.nan
    kmeans = KMeans(20)
    finite = x[:, 0].isfinite()
    given = (x, weights), (x.numpy(), weights), (x[finite], weights[finite])
    whole, blocks, kept = (kmeans.fit(some, weights=own) for some, own in given)
    for other in (blocks, kept):
        assert torch.allclose(other.centroids, whole.centroids, atol=1e-5)
        assert other.objective == pytest.approx(whole.objective)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(299), ValueError, r"weights must have 300 entries as x has rows, got shape \(299,\)"),
        (torch.ones(300, 1), ValueError, r"got shape \(300, 1\)"),
        ([1.0] * 300, TypeError, "weights must be a torch.Tensor, got list"),
        (torch.zeros(300), ValueError, "weights must be positive and finite, got values from 0 to 0"),
        (torch.full((300,), torch.inf), ValueError, "weights must be positive and finite"),
        (torch.full((300,), torch.nan), ValueError, "weights must be positive and finite"),
    ],
)
def test_bad_weights_are_named(weights, error, message):
    with pytest.raises(error, match=message):
        KMeans(20).fit(rows(), weights=weights)
    if error is ValueError:
        with pytest.raises(ValueError, match="weights must"):
            KMeans(20, backend="faiss").fit(rows(), weights=torch.ones(300))


# --- progress ------------------------------------------------------------------------------------------------------------------


def test_nothing_is_shown_by_default(capfd):
    KMeans(20).fit(rows())
    assert capfd.readouterr() == ("", "")


def test_a_bar_has_the_iteration_and_the_objective(capfd):
    result = KMeans(20, progress=True, niter=3, tol=0).fit(rows())
    shown = capfd.readouterr().err
    assert "K-means" in shown
    assert "3/3" in shown
    assert f"objective {result.report.objectives[-1]:.6g}" in shown


def test_without_tqdm_there_are_lines(capfd, monkeypatch):
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    result = KMeans(20, progress=True, niter=3, nredo=2, tol=0).fit(rows())
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "K-means: seeding"
    assert lines[1] == "K-means, run 1 of 2: iteration 0 of at most 3, seeded"
    assert len(lines) == 9
    assert "K-means, run 2 of 2: iteration 3 of at most 3, objective " in lines[-1]
    assert lines[-1].endswith("at most 0 s left")
    assert any(f"objective {result.report.objectives[-1]:.6g}," in line for line in lines)
