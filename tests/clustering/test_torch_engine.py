"""The PyTorch engine against a dense float64 Lloyd, its start, its stop, and the choice of an engine."""

import dense
import pytest
import torch
from cases import integers, unit
from helpers import blobs, seeded

from protoclip_losses import KMeans
from protoclip_losses.clustering import torch_engine
from protoclip_losses.clustering.assign import Scores
from protoclip_losses.clustering.lloyd import Lloyd
from protoclip_losses.clustering.points import KMeansConfig, ShardedPoints
from protoclip_losses.distributed import RankRows


def spread(rows, width, seed=0):
    """Rows around a third as many centers as a clustering of ten rows each would have: some clusters win, some lose rows."""
    centers = torch.randn(max(1, rows // 30), width, generator=seeded(seed))
    return centers[integers(len(centers), rows, seed)] + 0.4 * torch.randn(rows, width, generator=seeded(seed + 1))


def sharded(features):
    return ShardedPoints(features, None, RankRows(None, [len(features)]))


def lloyd(features, num_clusters, seed=0, run=0):
    """A run on these features after its start."""
    points = sharded(features)
    started = Lloyd(points, num_clusters, False, *torch_engine._frame(points, num_clusters, False))
    started.start(seed, run, None)
    return started


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("rows", "width", "num_clusters"), [(600, 8, 60), (900, 2, 30), (400, 16, 130), (200, 1, 9)])
def test_what_is_left_out_changes_nothing(rows, width, num_clusters, spherical):
    if spherical and width == 1:
        pytest.skip("two directions are too few")
    features = spread(rows, width) + 3
    init = features[torch.randperm(rows, generator=seeded(3))[:num_clusters]]
    for niter in (1, 2, 3, 8):
        clusters = KMeans(num_clusters, backend="torch", niter=niter, tol=0, spherical=spherical).fit(features, init=init)
        centroids, objectives = dense.lloyd(features, init, niter, spherical)
        assert torch.allclose(clusters.centroids.double(), centroids, atol=1e-5)
        assert clusters.report.objectives == pytest.approx(objectives[: len(clusters.report.objectives)], rel=1e-5)
        assert clusters.objective == pytest.approx(float(dense.distances(features, centroids).amin(1).sum()), rel=1e-5)


def test_most_of_the_work_is_left_out(monkeypatch):
    features = spread(3000, 8)
    scored = []
    real = Scores.best
    monkeypatch.setattr(
        Scores,
        "best",
        lambda self, block: (scored.append(len(block) * int(self.half_norms.isfinite().sum())), real(self, block))[1],
    )
    clusters = KMeans(300, backend="torch", niter=30, tol=0).fit(features)
    assert len(clusters.report.objectives) > 8
    assert sum(scored) < 0.5 * len(clusters.report.objectives) * 3000 * 300


def test_a_row_looked_at_again_forgets_what_its_bound_was():
    features = spread(600, 8)
    started = lloyd(features, 60)
    started.bound += 100  # no score beats that: every row looks at all centroids
    started._reassign(torch.zeros(60, dtype=torch.bool))
    scores = (features - started.origin) @ started.centroids.T - started.centroids.square().sum(1) / 2
    assert torch.allclose(started.bound, scores.topk(2).values[:, 1], atol=1e-4)


def test_a_run_ends_when_no_label_changes_or_the_objective_stands_still():
    features = spread(1000, 6)
    full = KMeans(100, backend="torch", niter=500, tol=0).fit(features)
    n = len(full.report.objectives)
    assert n < 60
    assert torch.equal(full.centroids, KMeans(100, backend="torch", niter=n, tol=0).fit(features).centroids)
    means, _ = dense.back_translate(full.labels, features, 100)
    assert torch.allclose(full.centroids.double(), means, atol=1e-5)  # a fixed point

    early = KMeans(100, backend="torch", niter=500, tol=0.02).fit(features).report.objectives
    drops = [1 - b / a for a, b in zip(full.report.objectives, full.report.objectives[1:], strict=False)]
    assert len(early) == 2 + next(i for i, drop in enumerate(drops) if drop <= 0.02)
    assert early == full.report.objectives[: len(early)]


def test_the_best_of_several_runs_is_kept():
    features = spread(400, 4)
    runs = [lloyd(features, 40, 7, run) for run in range(4)]
    for number, run in enumerate(runs):
        list(run.iterations(20, 0, 7, number))
    single = [run.objectives[-1] for run in runs]
    best = KMeans(40, backend="torch", seed=7, nredo=4, tol=0).fit(features)
    assert len(set(single)) > 1
    assert best.report.objectives[-1] == min(single)


def test_the_start_is_spread_over_the_data():
    """One row of each far group, where a uniform draw of K rows would miss a third of them."""
    features, groups = blobs(clusters=64, each=20, width=8)
    found = []
    for seed in range(5):
        started = lloyd(features, 64, seed)
        found.append(len(groups[torch.cdist(started.centroids + started.origin, features).argmin(1)].unique()))
    assert sum(found) / 5 > 54


@pytest.mark.parametrize("features", [torch.ones(50, 3), torch.arange(50.0)[:, None], torch.arange(50.0)[:, None] // 10])
def test_a_draw_takes_each_row_once(features, monkeypatch):
    drawn = []
    real = ShardedPoints.smallest
    monkeypatch.setattr(ShardedPoints, "smallest", lambda *args: (drawn.append(real(*args)[1]), real(*args))[1])
    lloyd(features, 50)
    assert torch.cat(drawn).sort().values.tolist() == list(range(50))


def test_a_draw_does_not_depend_on_the_order_of_rows_but_on_their_positions():
    features = spread(200, 3)
    order = torch.randperm(200, generator=seeded(4))
    one = torch_engine.kmeans(sharded(features), 20, CONFIG)
    other = torch_engine.kmeans(ShardedPoints(features[order], order, RankRows(None, [200])), 20, CONFIG)
    assert torch.allclose(one.centroids, other.centroids, atol=1e-5)


def test_rows_are_taken_in_the_order_of_their_index():
    features = spread(200, 3)
    order = torch.randperm(200, generator=seeded(4))
    clusterer = KMeans(20, tol=0)
    one, other = clusterer.fit(features), clusterer.fit(features[order], index=10 * order)
    assert torch.allclose(one.centroids, other.centroids, atol=1e-5)
    assert torch.equal(one.labels[order], other.labels)
    assert not torch.allclose(one.centroids, clusterer.fit(features[order]).centroids, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.arange(199), ValueError, "index must have 200 entries as x has rows, got 199"),
        (torch.arange(200.0), TypeError, "index must be int64"),
    ],
)
def test_a_bad_index_is_named(index, error, message):
    with pytest.raises(error, match=message):
        KMeans(20).fit(spread(200, 3), index=index)


CONFIG = KMeansConfig(niter=20, tol=0.0, nredo=1, spherical=False, seed=0, device=torch.device("cpu"))


def test_empty_clusters_start_again_where_rows_are_far_from_their_centroids():
    features, groups = blobs(clusters=5, each=20, width=4)
    init = torch.cat([features[groups == 0][:1].expand(4, -1), features[groups == 1][:1]])  # three of them stay empty
    clusters = KMeans(5, backend="torch", tol=0).fit(features, init=init)
    two = KMeans(2, backend="torch", tol=0).fit(features, init=init[3:])
    assert clusters.report.reseeded >= 3
    assert clusters.counts.min() > 0
    assert clusters.objective < 0.7 * two.objective


@pytest.mark.parametrize("features", [torch.zeros(40, 2), torch.full((40, 2), 7.3), torch.eye(3).repeat(14, 1)])
def test_there_is_nothing_to_seed_with_fewer_distinct_rows_than_prototypes(features):
    clusters = KMeans(8, backend="torch", tol=0).fit(features)
    distinct = len(features.unique(dim=0))
    assert clusters.report.reseeded == 0
    assert clusters.report.empty == 8 - distinct
    assert clusters.objective == pytest.approx(0, abs=1e-8)


def test_a_start_of_ones_own_is_used():
    features = spread(300, 4)
    first = KMeans(30, backend="torch", tol=0, niter=100).fit(features)
    again = KMeans(30, backend="torch", tol=0, seed=9).fit(features, init=first.centroids)
    assert torch.equal(again.labels, first.labels)
    assert len(again.report.objectives) < 5
    by_faiss = KMeans(30, backend="faiss", seed=9).fit(features, init=first.centroids)
    assert torch.equal(by_faiss.labels, first.labels)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (torch.zeros(3, 4), "init must have 4 rows as num_clusters and x say"),
        (torch.zeros(4, 3), "init must have width 4 as num_clusters and x say"),
        (torch.full((4, 4), torch.nan), "init must be finite"),
    ],
)
def test_a_bad_start_is_named(init, message):
    with pytest.raises(ValueError, match=message):
        KMeans(4).fit(torch.randn(20, 4), init=init)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_a_seed_of_any_size_is_a_seed(backend):
    features = unit(300, 6, dtype=torch.float32)
    seeds = 0, 2**31, 2**40, 2**70
    fits = [KMeans(30, backend=backend, seed=seed).fit(features).centroids for seed in seeds for _ in range(2)]
    assert all(torch.equal(*fits[i : i + 2]) for i in range(0, 8, 2))
    assert not any(torch.equal(fits[0], fits[i]) for i in (2, 4, 6))


def test_a_device_that_is_not_there_is_an_error_and_not_the_cpu():
    features = torch.randn(20, 2)
    if not torch.backends.mps.is_available():
        with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
            KMeans(2, device="mps").fit(features)
    with pytest.raises(ValueError, match="device must be a CPU or CUDA for backend='faiss', got 'mps'"):
        KMeans(2, backend="faiss", device="mps").fit(features)


def test_auto_says_what_it_picked():
    report = KMeans(3).fit(torch.randn(30, 2)).report
    assert report.backend == "torch"
    assert "runs on cpu" in report.reason
    assert KMeans(3, backend="faiss").fit(torch.randn(30, 2)).report.reason == "asked for"


def test_scores_know_the_best_column_the_lowest_of_equals_and_the_best_of_the_others():
    for columns in (1, 2, 63, 64, 65, 500):
        centroids = torch.randn(columns, 4, generator=seeded(columns))
        block = torch.randn(20, 4, generator=seeded(1))
        truth = block @ centroids.T - centroids.square().sum(1) / 2
        value, column, second = Scores(centroids).best(block)
        assert torch.equal(column, truth.argmax(1))
        assert torch.allclose(value, truth.amax(1), atol=1e-5)
        others = truth.scatter(1, column[:, None], -torch.inf).amax(1)
        assert torch.allclose(second, others, atol=1e-5)
    equal = torch.ones(300, 4)
    value, column, second = Scores(equal).best(block)
    assert column.tolist() == [0] * 20
    assert torch.equal(value, second)
