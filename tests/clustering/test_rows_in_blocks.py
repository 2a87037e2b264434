"""Rows that need not fit in memory give what the same rows in memory do; and how much memory they take."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import unit
from helpers import seeded

from protoclip_losses import EpisodicClusterer, KMeans
from protoclip_losses.clustering import row_source


class Blocks:
    """A re-iterable of blocks of different sizes, one of them empty."""

    def __init__(self, x, sizes):
        self.x, self.sizes, self.passes = x, sizes, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.x.split(self.sizes))


@pytest.fixture(params=["mapped", "mapped_parts", "array", "tensors", "blocks"])
def form(request, tmp_path):
    """A function that puts a tensor into a form that is read in blocks."""

    def mapped(x, name="x.npy"):
        np.save(tmp_path / name, x.numpy())
        return np.load(tmp_path / name, mmap_mode="r")

    def cut(x):
        third = len(x) // 3
        return x.split([third, 0, 1, len(x) - third - 1])

    return {
        "mapped": mapped,
        "mapped_parts": lambda x: [mapped(part, f"{i}.npy") for i, part in enumerate(cut(x))],
        "array": lambda x: x.numpy(),
        "tensors": lambda x: list(cut(x)),
        "blocks": lambda x: Blocks(x, [len(part) for part in cut(x)]),
    }[request.param]


def groups(rows, width, seed=0):
    centers = torch.randn(max(1, rows // 30), width, generator=seeded(seed))
    return centers[torch.randint(len(centers), (rows,), generator=seeded(seed))] + 0.4 * torch.randn(
        rows, width, generator=seeded(seed + 1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"spherical": True, "nredo": 2}, {"niter": 3, "tol": 0}], ids=str)
def test_the_clustering_is_that_of_the_rows_in_memory(form, dtype, settings, monkeypatch):
    monkeypatch.setattr(row_source, "STRIPE_ROWS", 400)
    monkeypatch.setattr("protoclip_losses.clustering.points.STRIPE_ROWS", 400)
    x = (groups(1500, 6) + 1).to(dtype)
    x[7], x[1400, 2], x[901] = torch.nan, torch.inf, -torch.inf
    kmeans = KMeans(60, max_dropped=0.1, **settings)
    whole, blocks = kmeans.fit(x), kmeans.fit(form(x))
    assert torch.allclose(blocks.centroids, whole.centroids, atol=1e-5)
    assert torch.equal(blocks.labels, whole.labels)
    assert torch.equal(blocks.counts, whole.counts)
    assert blocks.objective == pytest.approx(whole.objective, rel=1e-6)
    assert blocks.report.objectives == pytest.approx(whole.report.objectives, rel=1e-6)
    assert blocks.dropped == 3
    for num_labels in (1, 3):
        assert torch.equal(whole.predict(form(x), num_labels), whole.predict(x, num_labels))


def test_stripes_of_rows_change_nothing(monkeypatch):
    x = groups(3000, 6)
    whole = KMeans(100).fit(x)
    for module in ("row_source", "points"):
        monkeypatch.setattr(f"protoclip_losses.clustering.{module}.STRIPE_ROWS", 500)
    stripes = KMeans(100).fit(x)
    assert torch.allclose(stripes.centroids, whole.centroids, atol=1e-5)
    assert torch.equal(stripes.labels, whole.labels)


def test_init_index_and_a_far_row_are_taken(form):
    x = groups(900, 5)
    x[5] = 1e6
    order = torch.randperm(900, generator=seeded(3))
    for arguments in ({"init": x[:30]}, {"index": 7 * order}):
        whole, blocks = (KMeans(30).fit(rows, **arguments) for rows in (x, form(x)))
        assert torch.allclose(blocks.centroids, whole.centroids, rtol=1e-6, atol=1e-5)
        assert torch.equal(blocks.labels, whole.labels)


def test_a_clusterer_takes_them_too(form):
    x = groups(300, 4)
    assert torch.equal(EpisodicClusterer(20).fit(form(x)).labels, EpisodicClusterer(20).fit(x).labels)


def test_an_array_of_the_other_byte_order_is_read():
    x = groups(200, 4)
    assert torch.equal(KMeans(9).fit(x.numpy().astype(">f4")).labels, KMeans(9).fit(x).labels)


def test_blocks_are_read_a_few_times_an_iteration():
    x = groups(2000, 6)
    blocks = Blocks(x, 300)
    result = KMeans(150, niter=6, tol=0).fit(blocks)
    assert blocks.passes <= 60 + 5 * len(result.report.objectives)


def test_only_the_wanted_rows_of_a_file_are_read(tmp_path, monkeypatch):
    """Once clusters have settled few rows are read in an iteration."""
    read = []
    real = row_source.RowSource.read
    monkeypatch.setattr(
        row_source.RowSource,
        "read",
        lambda self, parts: ((read.append(len(block)), (part, block))[1] for part, block in real(self, parts)),
    )
    x = groups(3000, 8)
    result = KMeans(300, niter=30, tol=0).fit(x.numpy())
    assert len(result.report.objectives) > 8
    assert sum(read) < 3000 * (26 + 1.5 * len(result.report.objectives))  # up to 4 an iteration in the first ones


class Shrinking:
    def __init__(self):
        self.left = 4

    def __iter__(self):
        self.left -= 1
        return iter([torch.randn(10, 2, generator=seeded(i)) for i in range(max(2, 2 + self.left))])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ((row for row in [torch.ones(9, 2)]), TypeError, "x must be iterable more than once, .* got a generator"),
        (np.ones((4, 2), dtype=np.int64), TypeError, "x must be float16, bfloat16, float32 or float64, got int64"),
        (np.ones(4, dtype=np.float32), ValueError, r"x must have 2 dimensions \(rows, width\), got shape \(4,\)"),
        (
            [np.ones((4, 2)), np.ones((4, 3))],
            ValueError,
            r"x must hold arrays of one width and dtype, got \(n, 2\) of torch.float64 and",
        ),
        ([np.ones((4, 2)), np.ones((4, 2), np.float32)], ValueError, "x must hold arrays of one width and dtype"),
        ([np.ones((4, 2)), [1.0]], TypeError, "x must be a torch.Tensor, got list"),
        (Blocks(torch.ones(0, 2), 3), ValueError, "as num_clusters=2, got 0"),
        (np.ones((4, 0), dtype=np.float32), ValueError, "x must have a width of at least 1, got 0"),
        (np.full((9, 2), 2e38, dtype=np.float32), ValueError, r"x must hold values below 1e\+38"),
        (
            np.full((9, 2), np.nan, dtype=np.float32),
            ValueError,
            "x must hold NaN or Inf in at most .* got 9 of 9",
        ),
        (Shrinking(), ValueError, "x must give the same rows each time, got 30 after 50 before"),
    ],
)
def test_bad_rows_are_named(x, error, message):
    with pytest.raises(error, match=message):
        KMeans(2).fit(x)


def test_blocks_that_differ_are_named():
    class Mixed:
        def __iter__(self):
            return iter([torch.ones(9, 2), torch.ones(9, 3)])

    with pytest.raises(
        ValueError, match=r"x must give blocks of one width and dtype, got \(n, 2\) of torch.float32 and \(n, 3\)"
    ):
        KMeans(2).fit(Mixed())


def test_faiss_says_that_it_needs_rows_in_memory():
    with pytest.raises(ValueError, match=r"x must be a torch.Tensor in memory for backend='faiss'.*backend='torch' takes them"):
        KMeans(2, backend="faiss").fit(unit(9, 2).numpy())


def test_a_prediction_names_another_width():
    with pytest.raises(ValueError, match="x must have width 2 as the centroids, got 3"):
        KMeans(2).fit(unit(9, 2)).predict(np.ones((4, 3)))


SCRIPT = """
import sys, threading, time
from pathlib import Path
import numpy as np, torch
from protoclip_losses import KMeans

def status(field):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1]) / 1024

torch.set_num_threads(1)
ROWS, WIDTH = 150_000, 256
x = np.lib.format.open_memmap(sys.argv[1], "w+", np.float16, (ROWS, WIDTH))
generator = np.random.default_rng(0)
for start in range(0, ROWS, 10_000):
    x[start : start + 10_000] = generator.standard_normal((10_000, WIDTH), dtype=np.float32)
del x
x = np.load(sys.argv[1], mmap_mode="r")
KMeans(64, niter=1).fit(x[:2000]).predict(x[:2000])  # thread pools and lazy imports
before, peak = status("RssAnon"), []
def watch():
    while True:
        peak.append(status("RssAnon"))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
KMeans(4, niter=2, max_dropped=0).fit(x).predict(x)
print(max(peak) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_stay_in_their_file(tmp_path):
    """They would take 73 MB more; labels, scores, bounds, norms and positions are 4, and what is made of a block is up to 75."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert float(done.stdout.split()[-1]) < 110
