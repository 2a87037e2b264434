"""Clusters of bounded size against the exact assignment of scipy, and what must hold of them for any rows."""

import numpy as np
import pytest
import torch
from cases import integers
from helpers import seeded
from scipy.optimize import linear_sum_assignment

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, KMeansResult
from protoclip_losses.clustering.bounded import Auction
from protoclip_losses.clustering.points import ShardedPoints
from protoclip_losses.distributed import RankRows


def rows_of(count, width, seed=0):
    """Around a few centers of unequal weight, so that some clusters are far too large."""
    centers = 3 * torch.randn(5, width, generator=seeded(seed))
    weight = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4])
    return centers[weight[integers(9, count, seed)]] + torch.randn(count, width, generator=seeded(seed + 1))


def auction(x, centroids, max_size, epsilon):
    points = ShardedPoints(x, None, RankRows(None, [len(x)]))
    nearest = torch.cdist(x.double(), centroids.double()).argmin(1)
    return Auction(points, centroids, nearest, max_size, epsilon).run()


def cost(x, centroids, labels):
    return float((x.double() - centroids[labels].double()).square().sum())


@pytest.mark.parametrize(("count", "num_clusters", "max_size"), [(60, 6, 10), (61, 7, 9), (90, 9, 15), (40, 40, 1), (33, 2, 17)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_assignment_is_within_n_epsilon_of_the_best_one(count, num_clusters, max_size, seed):
    x = rows_of(count, 3, seed) + 50
    centroids = x[torch.randperm(count, generator=seeded(seed))[:num_clusters]]
    distances = np.repeat(torch.cdist(x.double(), centroids.double()).square().numpy(), max_size, 1)
    best = float(distances[linear_sum_assignment(distances)].sum())
    for epsilon in (1.0, 0.01, 0.0001):
        labels = auction(x, centroids, max_size, epsilon)
        assert int(torch.bincount(labels, minlength=num_clusters).max()) <= max_size
        assert best - 1e-6 <= cost(x, centroids, labels) <= best + count * epsilon * 1.01


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
def test_no_cluster_has_more_rows(x, num_clusters, max_size, settings):
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


def test_centroids_are_the_means_of_their_members():
    x = rows_of(200, 4) + 100
    result = KMeans(10, max_cluster_size=20).fit(x)
    assert int(KMeans(10).fit(x).counts.max()) > 20
    for cluster in range(10):
        assert torch.allclose(result.centroids[cluster], x[result.labels == cluster].double().mean(0).float(), atol=1e-4)


def test_a_bound_that_no_cluster_reaches_changes_nothing():
    x = rows_of(200, 4)
    free, bounded = KMeans(10).fit(x), KMeans(10, max_cluster_size=200).fit(x)
    assert torch.equal(free.labels, bounded.labels)
    assert torch.equal(free.centroids, bounded.centroids)
    assert (bounded.report.unbounded_objective, bounded.report.not_nearest) == (free.objective, 0)
    assert "unbounded_objective" not in free.report.scalars()
    assert bounded.report.scalars()["not_nearest"] == 0


def test_it_costs_little_more_than_k_means_and_the_report_says_how_much():
    x = rows_of(400, 4)
    report = KMeans(40, max_cluster_size=12).fit(x).report
    assert 0 < report.not_nearest < 200
    assert 0.9 * report.unbounded_objective < report.objective < 1.3 * report.unbounded_objective
    assert report.scalars()["unbounded_objective"] == report.unbounded_objective
    assert report.seconds.keys() == {"kmeans", "assign", "bound"}


def test_equal_rows_are_told_apart_by_their_position():
    """Otherwise the ranks of a group might keep different ones."""
    x = torch.zeros(10, 2)
    x[5:] = 1
    order = torch.randperm(10, generator=seeded(3))
    one = KMeans(5, max_cluster_size=2).fit(x)
    other = KMeans(5, max_cluster_size=2).fit(x[order], index=order)
    assert torch.equal(one.labels[order], other.labels)


def test_rows_in_blocks_get_the_labels_of_rows_in_memory():
    x = rows_of(300, 4)
    one = KMeans(20, max_cluster_size=15).fit(x)
    for rows in (x.numpy(), [x[:7].numpy(), x[7:].numpy()]):
        blocks = KMeans(20, max_cluster_size=15).fit(rows)
        assert torch.equal(blocks.labels, one.labels)
        assert torch.allclose(blocks.centroids, one.centroids, atol=1e-5)


def test_rows_that_are_not_finite_take_no_room():
    x = rows_of(101, 4)
    x[17] = torch.nan
    result = KMeans(10, max_cluster_size=10).fit(x)
    assert result.labels[17] == -1
    assert result.counts.tolist() == [10] * 10


def test_a_file_keeps_the_report_and_one_of_0_7_7_has_none(tmp_path):
    result = KMeans(10, max_cluster_size=20).fit(rows_of(200, 4))
    result.save(tmp_path / "clusters")
    loaded = KMeansResult.load(tmp_path / "clusters")
    assert loaded.report.unbounded_objective == result.report.unbounded_objective
    assert loaded.report.not_nearest == result.report.not_nearest > 0


@pytest.mark.parametrize(
    ("settings", "fit", "message"),
    [
        ({"max_cluster_size": 0}, {}, "max_cluster_size must be at least 1, got 0"),
        (
            {"max_cluster_size": 9},
            {},
            "max_cluster_size must be at least 10 for 100 finite rows in num_clusters=10 clusters, got 9",
        ),
        (
            {"max_cluster_size": 10},
            {"weights": torch.ones(100)},
            "weights must be None with max_cluster_size=10, which counts rows, got a tensor",
        ),
    ],
)
def test_errors(settings, fit, message):
    with pytest.raises(ValueError, match=message):
        KMeans(10, **settings).fit(rows_of(100, 4), **fit)


def test_a_mixture_has_no_bound():
    with pytest.raises(ValueError, match="labels_per_sample must be 1 with max_cluster_size=10, got 2"):
        EpisodicClusterer(12, max_cluster_size=10, labels_per_sample=2)


def test_prototypes_of_bounded_clusters():
    h = torch.nn.functional.normalize(rows_of(120, 4), dim=1)
    bank = FeatureBank.from_features(torch.arange(120), image=h, text=h.flip(0))
    prototypes = EpisodicClusterer(12, max_cluster_size=10).build(bank)
    for term in prototypes.terms.values():
        assert torch.bincount(term.labels).tolist() == [10] * 12
