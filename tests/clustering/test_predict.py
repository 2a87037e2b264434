"""New rows are assigned as the rows that were clustered: against a dense float64 order of all centroids."""

import pytest
import torch
from cases import integers, unit
from helpers import seeded

from protoclip_losses import KMeans
from protoclip_losses.clustering import assign
from protoclip_losses.clustering.report import ClusteringReport


def dense_order(x, centroids):
    """Centroids of each row from the nearest to the farthest in float64, the lowest id first among equals; and distances."""
    distances = (x.double()[:, None] - centroids.double()).square().sum(2)
    return distances.argsort(dim=1, stable=True), distances


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rows_that_were_clustered_get_their_labels(backend, spherical, dtype):
    x = (2 * unit(700, 6, dtype=torch.float32) + 0.3).to(dtype)
    x[5], x[600, 2] = torch.nan, torch.inf
    result = KMeans(50, backend=backend, spherical=spherical, niter=4, max_dropped=0.1).fit(x)
    assert torch.equal(result.predict(x), result.labels)
    assert torch.equal(result.predict(x, 3)[:, 0], result.labels)


@pytest.mark.parametrize("num_labels", [1, 2, 5, 70])
@pytest.mark.parametrize("offset", [0, 1000])
def test_new_rows_get_their_nearest_centroids_nearest_first(num_labels, offset):
    result = KMeans(70, niter=3).fit(offset + torch.randn(400, 5, generator=seeded(0)))
    x = offset + torch.randn(3000, 5, generator=seeded(1))  # more rows than a block
    labels = result.predict(x, num_labels)
    assert labels.dtype == torch.int64
    order, distances = dense_order(x, result.centroids)
    if num_labels == 1:
        assert labels.shape == (3000,)
        labels = labels[:, None]
    assert labels.shape == (3000, num_labels)
    assert (labels.sort(1).values.diff(dim=1) > 0).all()  # each centroid once
    torch.testing.assert_close(distances.gather(1, labels), distances.gather(1, order[:, :num_labels]), rtol=1e-5, atol=1e-4)
    clear = (distances.sort(1).values.diff(dim=1)[:, :num_labels] > 1e-3).all(1)
    assert clear.sum() > 100 or num_labels == 70
    assert torch.equal(labels[clear], order[clear, :num_labels])


@pytest.mark.parametrize("num_clusters", [1, 2, 64, 65, 200])
def test_ties_go_to_the_lowest_id(num_clusters):
    """Pairs and groups of equal centroids."""
    different = torch.randn(max(1, num_clusters // 3), 2, generator=seeded(0))
    x = different[integers(len(different), num_clusters, 0)]
    report = ClusteringReport("torch", "", (), 0.0, 1.0, 0, 0, 0, {})
    result = KMeans(num_clusters).fit(x)
    result = type(result)(x, result.labels, result.counts, 0.0, report)
    order, _ = dense_order(x, x)
    for num_labels in range(1, min(num_clusters, 7) + 1):
        assert torch.equal(result.predict(x, num_labels).view(num_clusters, -1), order[:, :num_labels])


def test_an_empty_cluster_takes_part():
    x = torch.eye(3).repeat(4, 1)
    result = KMeans(5, tol=0).fit(x)
    assert (result.counts == 0).sum() == 2
    for cluster in range(5):
        label = int(result.predict(result.centroids[cluster : cluster + 1]))
        assert torch.equal(result.centroids[label], result.centroids[cluster])


def test_rows_that_are_not_finite_get_minus_one():
    result = KMeans(3).fit(torch.randn(30, 2, generator=seeded(0)))
    x = torch.tensor([[torch.nan, 0.0], [0.0, 1.0], [torch.inf, 0.0], [0.0, -torch.inf]])
    assert (result.predict(x) == -1).tolist() == [True, False, True, True]
    assert (result.predict(x, 2) == -1).tolist() == [[True, True], [False, False], [True, True], [True, True]]
    assert (result.predict(x[[0, 2]]) == -1).all()
    assert result.predict(x[:0]).tolist() == []
    assert result.predict(x[:0], 2).shape == (0, 2)


def test_a_prediction_is_a_constant_and_leaves_its_rows_as_they_are():
    x = torch.randn(30, 2, generator=seeded(0), requires_grad=True)
    before = x.detach().clone()
    assert not KMeans(3).fit(x).predict(x, 2).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("num_labels", [1, 4])
def test_scores_are_made_in_blocks_of_rows(num_labels, monkeypatch):
    rows = []
    real = assign.Scores._grouped
    monkeypatch.setattr(assign.Scores, "_grouped", lambda self, block: (rows.append(len(block)), real(self, block))[1])
    result = KMeans(100, niter=1).fit(torch.randn(3000, 4, generator=seeded(0)))
    rows.clear()
    result.predict(torch.randn(3000, 4, generator=seeded(1)), num_labels)
    assert 3000 <= sum(rows) < 3300  # a few are looked at again
    assert max(rows) <= 1024


@pytest.mark.parametrize(
    ("x", "num_labels", "error", "message"),
    [
        (torch.ones(4, 3), 1, ValueError, r"x must have width 2 as the centroids, got shape \(4, 3\)"),
        (torch.ones(2), 1, ValueError, "x must have 2 dimensions"),
        (torch.ones(4, 2).long(), 1, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        ([[1.0, 2.0]], 1, TypeError, "x must be a torch.Tensor, got list"),
        (torch.full((4, 2), 2e38), 1, ValueError, r"x must hold values below 1e\+38, which float32 can subtract, got 2e\+38"),
        (torch.full((4, 2), 1e300, dtype=torch.float64), 1, ValueError, r"x must hold values below 1e\+38"),
        (torch.ones(4, 2), 4, ValueError, "num_labels must be at most the number of centroids, 3, got 4"),
        (torch.ones(4, 2), 0, ValueError, "num_labels must be at least 1, got 0"),
        (torch.ones(4, 2), 1.0, TypeError, "num_labels must be an int, got float"),
    ],
)
def test_bad_rows_to_predict_are_named(x, num_labels, error, message):
    result = KMeans(3).fit(torch.randn(30, 2, generator=seeded(0)))
    with pytest.raises(error, match=message):
        result.predict(x, num_labels)


# --- data of any scale ---------------------------------------------------------------------------------------------------------


def with_far_rows(far, count):
    """2,000 rows on the sphere, and a few far away."""
    rows = unit(2000, 16, 0, torch.float32)
    outliers = unit(count, 16, 1, torch.float32)
    outliers[:, 0] += far
    return torch.cat([rows, outliers])


def all_distances(x, centroids):
    return torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")


def assert_nearest(x, centroids, labels):
    """Each label's distance is the smallest of all; equals have the lowest id."""
    assert torch.equal(labels, all_distances(x, centroids).sort(dim=1, stable=True).indices[:, 0])


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("far", [1e3, 1e4, 65504.0, 1e6, 1e12])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_labels_are_the_nearest_centroids_whatever_lies_far_away(backend, far, count):
    """0.6 took distances from a mean that one row of 65504 dragged away: 97% of the labels were wrong."""
    x = with_far_rows(far, count)
    result = KMeans(51, backend=backend).fit(x)
    assert_nearest(x, result.centroids, result.labels)
    assert_nearest(x, result.centroids, result.predict(x))
    several = all_distances(x, result.centroids).sort(dim=1, stable=True).indices[:, :3]
    assert torch.equal(result.predict(x, 3), several)
    if count == 1:  # it has a cluster of its own, and the others are clustered as if it were not there
        alone = KMeans(50, backend=backend).fit(x[:-1]).objective
        assert result.objective == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e15])
def test_labels_are_the_nearest_centroids_at_any_scale(factor):
    x = unit(500, 8, 0, torch.float32) * factor
    result = KMeans(20).fit(x)
    assert_nearest(x, result.centroids, result.labels)
    assert_nearest(x, result.centroids, result.predict(x))


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_labels_are_the_nearest_centroids_far_from_the_origin(offset):
    x = unit(500, 8, 0, torch.float32) + offset
    result = KMeans(20).fit(x)
    assert_nearest(x, result.centroids, result.labels)


def test_many_centroids_within_rounding_of_each_other():
    """Two clumps far apart, each with more centroids than are candidates at first."""
    x = unit(400, 4, 0, torch.float32)
    x[200:, 1] += 1e5
    x[:200, 1] -= 1e5
    centroids = x[::7].contiguous()
    result = KMeans(len(centroids)).fit(x, init=centroids)
    assert_nearest(x, result.centroids, result.labels)
    got = result.predict(x, 5)
    assert torch.equal(got, all_distances(x, result.centroids).sort(dim=1, stable=True).indices[:, :5])


def test_equal_centroids_are_a_tie_for_the_lowest_id():
    centroids = torch.ones(40, 3)
    result = KMeans(40).fit(torch.arange(120.0).reshape(40, 3), init=centroids)
    same = type(result)(centroids, result.labels, result.counts, result.objective, result.report)
    assert same.predict(unit(9, 3, 0, torch.float32)).tolist() == [0] * 9
    assert same.predict(unit(9, 3, 0, torch.float32), 3).tolist() == [[0, 1, 2]] * 9
