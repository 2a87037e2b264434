"""Clusters of bounded size: the auction against the exact optimum, and KMeans(max_cluster_size=) on rows of all kinds."""

import numpy as np
import pytest
import torch
from cases import integers
from helpers import seeded
from scipy.optimize import linear_sum_assignment

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, KMeansResult
from protoclip_losses.clustering import bounded
from protoclip_losses.clustering.bounded import EPSILONS, Auction
from protoclip_losses.clustering.points import ShardedPoints
from protoclip_losses.distributed import RankRows


def gaussian(rows, width, seed=0):
    return torch.randn(rows, width, generator=seeded(seed))


def costs(x, centroids):
    """Squared distances (N, K) in float64, from the differences."""
    return (x.double()[:, None] - centroids.double()[None]).square().sum(2)


def least_cost(x, centroids, max_size):
    """The smallest sum of squared distances: the assignment to ``max_size`` columns for each centroid."""
    columns = costs(x, centroids).repeat_interleave(max_size, 1).numpy()
    return columns[linear_sum_assignment(columns)].sum()


def auction(x, centroids, max_size, epsilon):
    points = ShardedPoints(x, None, RankRows(None, [len(x)]))
    return Auction(points, centroids, costs(x, centroids).argmin(1), max_size, epsilon).run()


def sizes(labels, num_clusters):
    return torch.bincount(labels, minlength=num_clusters)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(
    ("rows", "width", "num_clusters", "max_size"),
    [(300, 5, 30, 10), (301, 3, 23, 14), (250, 8, 70, 5), (97, 1, 9, 11), (40, 4, 2, 20), (131, 6, 131, 1)],
)
def test_the_auction_is_within_n_epsilon_of_the_optimum(rows, width, num_clusters, max_size, epsilon):
    x, centroids = gaussian(rows, width) + 3, gaussian(num_clusters, width, 1) / 2 + 3
    labels = auction(x, centroids, max_size, epsilon)
    assert sizes(labels, num_clusters).max() <= max_size
    cost, least = float(costs(x, centroids).gather(1, labels[:, None]).sum()), least_cost(x, centroids, max_size)
    assert least - 1e-9 <= cost <= least + rows * epsilon


def test_a_small_epsilon_gives_the_optimum():
    x, centroids = gaussian(200, 4), gaussian(13, 4, 1)
    labels = auction(x, centroids, 16, 1e-5)
    assert float(costs(x, centroids).gather(1, labels[:, None]).sum()) == pytest.approx(least_cost(x, centroids, 16), rel=1e-6)


def test_points_compete_for_a_place_and_the_one_that_loses_least_goes():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert auction(x, torch.tensor([[1.0], [10.0]]), 3, 0.01).tolist() == [0, 0, 0, 1]


def test_the_lowest_position_wins_among_equals():
    x = torch.zeros(5, 2)
    centroids = torch.tensor([[0.0, 0.0], [3.0, 0.0], [9.0, 0.0]])
    points = ShardedPoints(x, torch.tensor([4, 1, 3, 0, 2]), RankRows(None, [5]))
    labels = Auction(points, centroids, torch.zeros(5, dtype=torch.int64), 2, 0.1).run()
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2]
    in_order = Auction(ShardedPoints(x, None, RankRows(None, [5])), centroids, torch.zeros(5, dtype=torch.int64), 2, 0.1).run()
    assert labels.tolist() == in_order[torch.tensor([4, 1, 3, 0, 2])].tolist()


def test_it_ends_where_the_next_cluster_is_far_away():
    """22 points compete for 20 places: prices have to rise to a million times epsilon."""
    x = torch.cat([gaussian(22, 2) * 1e-3, gaussian(8, 2, 1) + 1e3])
    centroids = torch.cat([x[:4], x[22:24]])
    labels = auction(x, centroids, 5, 1e-6)
    assert sizes(labels, 6).tolist() == [5] * 6


OUTLIER = gaussian(120, 4)
OUTLIER[7] = 1e6
ROWS = {
    "gaussian": (gaussian(231, 6), 20, {}),
    "spherical": (gaussian(231, 6) + 1, 20, {"spherical": True}),
    "half": (gaussian(231, 6).half(), 20, {}),
    "bfloat16": (gaussian(231, 6).bfloat16(), 20, {}),
    "double": (gaussian(231, 6).double(), 20, {}),
    "faiss": (gaussian(231, 6), 20, {"backend": "faiss"}),
    "offset": (gaussian(200, 4) + 1e4, 20, {}),
    "small": (gaussian(200, 4) * 1e-20, 20, {}),
    "large": (gaussian(200, 4) * 1e20, 20, {}),
    "outlier": (OUTLIER, 12, {}),
    "duplicates": (gaussian(3, 4).repeat_interleave(torch.tensor([60, 30, 10]), 0), 10, {}),
    "all equal": (torch.ones(50, 3), 7, {}),
    "zeros": (torch.zeros(50, 3), 7, {}),
    "one cluster": (gaussian(50, 3), 1, {}),
    "as many clusters": (gaussian(50, 3), 50, {}),
    "runs": (gaussian(200, 4), 20, {"nredo": 2, "tol": 0}),
}


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("name", ROWS)
def test_no_cluster_has_more_rows(name, factor):
    x, num_clusters, settings = ROWS[name]
    most = -(-int(len(x) * factor) // num_clusters)
    result = KMeans(num_clusters, max_cluster_size=most, **settings).fit(x)
    counts = sizes(result.labels, num_clusters)
    assert counts.max() <= most
    assert counts.sum() == len(x)
    assert torch.equal(result.counts, counts)
    assert result.centroids.isfinite().all()
    distances = costs(x, result.centroids)
    own = distances.gather(1, result.labels[:, None])[:, 0]
    assert result.objective == pytest.approx(float(own.sum()), rel=1e-5)
    assert result.report.objective == result.objective
    assert (result.labels != result.predict(x)).sum() == result.report.not_nearest


def test_centroids_are_the_means_of_their_members():
    x = gaussian(231, 6) + 50
    result = KMeans(20, max_cluster_size=12).fit(x)
    means = torch.stack([x[result.labels == k].double().mean(0) for k in range(20)])
    assert torch.allclose(result.centroids.double(), means, atol=1e-4)
    spherical = KMeans(20, max_cluster_size=12, spherical=True).fit(x - 49)
    sums = torch.stack([(x - 49)[spherical.labels == k].double().sum(0) for k in range(20)])
    assert torch.allclose(spherical.centroids.double(), torch.nn.functional.normalize(sums, dim=1), atol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_labels_are_near_the_best_for_their_centroids(spherical):
    x = gaussian(230, 6) + 0.5
    result = KMeans(23, max_cluster_size=10, spherical=spherical).fit(x)
    distance = result.predict(x)
    epsilon = EPSILONS[-1] * float(costs(x, result.centroids).gather(1, distance[:, None]).mean())
    assert result.objective <= least_cost(x, result.centroids, 10) + len(x) * epsilon


def test_a_cluster_that_stays_empty_keeps_its_centroid():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    init = torch.tensor([[1.5], [100.0], [-5.0]])
    result = KMeans(3, max_cluster_size=3, niter=1).fit(x, init=init)
    assert result.counts.max() <= 3
    assert result.centroids.isfinite().all()


def test_alternating_lowers_the_objective_and_the_best_is_returned(monkeypatch):
    x = gaussian(600, 5).repeat(2, 1) + 0.1 * gaussian(1200, 5, 1)
    fit = KMeans(60, max_cluster_size=20, tol=0).fit
    found, real = [], bounded._assigned

    def recorded(points, centroids, known, spherical):
        labels, objective = real(points, centroids, known, spherical)
        if known is not None:
            found.append(objective)
        return labels, objective

    monkeypatch.setattr(bounded, "_assigned", recorded)
    result = fit(x)
    assert result.objective == min(found) < 0.99 * found[0]
    assert len(found) <= 2 * 20


def test_a_bound_that_no_cluster_exceeds_changes_nothing():
    x = gaussian(300, 5)
    plain = KMeans(20).fit(x)
    result = KMeans(20, max_cluster_size=int(plain.counts.max())).fit(x)
    assert torch.equal(result.centroids, plain.centroids)
    assert torch.equal(result.labels, plain.labels)
    assert result.report.unbounded_objective == result.objective == plain.objective
    assert result.report.not_nearest == 0
    assert plain.report.unbounded_objective is None
    assert "not_nearest" not in plain.report.scalars()
    assert result.report.scalars()["unbounded_objective"] == plain.objective


def test_rows_with_nan_have_no_cluster_and_take_no_place():
    x = gaussian(103, 4)
    x[5], x[50], x[102] = torch.nan, torch.inf, -torch.inf
    result = KMeans(10, max_cluster_size=10, max_dropped=0.1).fit(x)
    assert result.counts.tolist() == [10] * 10
    assert (result.labels == -1).nonzero().flatten().tolist() == [5, 50, 102]


def test_the_same_call_gives_the_same_bits():
    x = gaussian(400, 6)
    first, second = (KMeans(33, max_cluster_size=13).fit(x) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.labels, second.labels)


def test_the_order_of_rows_does_not_matter():
    x, order = torch.cat([gaussian(300, 6), gaussian(50, 6, 1).repeat(3, 1)]), torch.randperm(450, generator=seeded(2))
    kmeans = KMeans(45, max_cluster_size=10)
    first, second = kmeans.fit(x, index=torch.arange(450)), kmeans.fit(x[order], index=order)
    assert torch.equal(second.labels, first.labels[order])
    assert torch.allclose(second.centroids, first.centroids, atol=1e-5)


@pytest.mark.parametrize("form", ["mapped", "blocks"])
def test_rows_in_blocks_give_what_the_same_rows_in_memory_do(form, tmp_path):
    x = gaussian(900, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    rows = np.load(tmp_path / "x.npy", mmap_mode="r") if form == "mapped" else list(x.split([301, 0, 599]))
    kmeans = KMeans(90, max_cluster_size=10)
    whole, blocks = kmeans.fit(x), kmeans.fit(rows)
    assert torch.equal(blocks.labels, whole.labels)
    assert torch.allclose(blocks.centroids, whole.centroids, atol=1e-5)
    assert blocks.objective == pytest.approx(whole.objective, rel=1e-6)


def test_a_round_reads_only_the_rows_that_bid(monkeypatch):
    read, real = [], ShardedPoints.blocks

    def blocks(self, rows=None, step=None):
        for part, block in real(self, rows, step):
            read.append(len(block))
            yield part, block

    monkeypatch.setattr(ShardedPoints, "blocks", blocks)
    x, centroids = gaussian(3000, 4), gaussian(300, 4, 1)
    auction(x, centroids, 20, 1.0)
    assert len(read) > 2
    assert sum(read) < 3000
    assert read[-1] < 100


def test_save_and_load(tmp_path):
    result = KMeans(20, max_cluster_size=12).fit(gaussian(231, 6))
    result.save(tmp_path / "clusters")
    loaded = KMeansResult.load(tmp_path / "clusters")
    assert loaded.report == result.report
    assert loaded.report.not_nearest > 0
    assert torch.equal(loaded.labels, result.labels)


def test_a_result_of_0_7_7_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "protoclip_losses.clustering.result.asdict",
        lambda report: {k: v for k, v in vars(report).items() if k not in ("unbounded_objective", "not_nearest")},
    )
    KMeans(20).fit(gaussian(231, 6)).save(tmp_path / "clusters")
    report = KMeansResult.load(tmp_path / "clusters").report
    assert (report.unbounded_objective, report.not_nearest) == (None, 0)


def test_the_prototypes_of_an_episode_have_bounded_counts():
    bank = FeatureBank.from_features(torch.arange(200), image=gaussian(200, 6), text=gaussian(200, 6, 1))
    prototypes = EpisodicClusterer(20, max_cluster_size=10).build(bank)
    for term in prototypes.terms.values():
        assert sizes(term.labels, 20).tolist() == [10] * 20
    with pytest.raises(ValueError, match="labels_per_sample must be at most 1 with max_cluster_size=10, got 2"):
        EpisodicClusterer(20, max_cluster_size=10, labels_per_sample=2)


@pytest.mark.parametrize(
    ("value", "arguments", "error", "message"),
    [
        (9, {}, ValueError, "max_cluster_size must be at least 11 for 103 finite rows in num_clusters=10 clusters, got 9"),
        (0, {}, ValueError, "max_cluster_size must be at least 1, got 0"),
        (1.5, {}, TypeError, "max_cluster_size must be an int, got float"),
        (20, {"weights": torch.ones(103)}, ValueError, "weights must be None with max_cluster_size=20, which counts rows"),
    ],
)
def test_bad_bounds_are_named(value, arguments, error, message):
    with pytest.raises(error, match=message):
        KMeans(10, max_cluster_size=value).fit(gaussian(103, 3), **arguments)


def rows_of(count, width, seed=0):
    """Around a few centers of unequal weight, so that some clusters are far too large."""
    centers = 3 * torch.randn(5, width, generator=seeded(seed))
    weight = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4])
    return centers[weight[integers(9, count, seed)]] + torch.randn(count, width, generator=seeded(seed + 1))


def cost(x, centroids, labels):
    return float((x.double() - centroids[labels].double()).square().sum())


HALVES = torch.cat([torch.zeros(30, 2), torch.ones(3, 2)])


@pytest.mark.parametrize(
    ("x", "num_clusters", "max_size"),
    [
        (rows_of(200, 4), 10, 20),
        (rows_of(203, 4), 10, 21),
        (rows_of(100, 4) + 1e4, 7, 15),
        (rows_of(100, 4) * 1e-6, 7, 15),
        (rows_of(100, 4).half(), 7, 15),
        (torch.cat([rows_of(99, 4), torch.full((1, 4), 1e6)]), 5, 20),
        (HALVES, 3, 11),
        (torch.zeros(12, 3), 4, 3),
        (torch.zeros(12, 3), 1, 12),
        (torch.arange(20.0)[:, None], 20, 1),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"spherical": True}, {"backend": "faiss"}])
def test_no_cluster_has_more_rows_with_any_settings(x, num_clusters, max_size, settings):
    if settings == {"spherical": True} and not bool((torch.linalg.vector_norm(x.float(), dim=1) > 0).all()):
        pytest.skip("zeros have no direction")
    result = KMeans(num_clusters, max_cluster_size=max_size, **settings).fit(x)
    assert int(result.counts.max()) <= max_size
    assert torch.equal(result.counts, torch.bincount(result.labels, minlength=num_clusters))
    assert result.objective == pytest.approx(cost(x, result.centroids, result.labels), rel=1e-5, abs=1e-12)
    assert result.report.objective == result.objective
    distances = torch.cdist(x.double(), result.centroids.double())
    own = distances.gather(1, result.labels[:, None])[:, 0]
    if "spherical" not in settings and result.report.not_nearest:
        assert result.report.not_nearest >= int((own > distances.amin(1) * (1 + 1e-6) + 1e-12).sum())


def test_it_costs_little_more_than_k_means_and_the_report_says_how_much():
    x = rows_of(400, 4)
    report = KMeans(40, max_cluster_size=12).fit(x).report
    assert 0 < report.not_nearest < 200
    assert 0.9 * report.unbounded_objective < report.objective < 1.3 * report.unbounded_objective
    assert report.scalars()["unbounded_objective"] == report.unbounded_objective
    assert report.seconds.keys() == {"kmeans", "assign", "bound"}
