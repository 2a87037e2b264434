"""KMeans by itself: its results are those of 0.6, and new rows are assigned as the rows that were clustered."""

import zlib

import pytest
import torch
from cases import integers, unit
from helpers import seeded

from protoclip_losses import EpisodicClusterer, KMeans
from protoclip_losses.clustering import assign
from protoclip_losses.clustering.report import ClusteringReport
from protoclip_losses.clustering.torch_engine import exponential_keys


def pattern(rows=60, width=3):
    """Numbers that are the same on every machine, whatever its random generator."""
    return ((torch.arange(rows * width) * 7919 % 9973 % 641).float() / 641 - 0.5).reshape(rows, width)


X = pattern()
WITH_NAN = X.index_fill(0, torch.tensor([7]), torch.nan)

# What EpisodicClusterer(9, backend="torch", **settings).fit(x, **arguments) of version 0.6.0 returned: labels (- for -1), a
# checksum of the centroids' bits, the objective, and the number of iterations.
OF_VERSION_06 = {
    "default": ({}, X, {}, "651642308156227435561274300516423001562274355611743005167220", 3216459466, 1.7261768690077588, 5),
    "runs": (
        {"seed": 5, "nredo": 3, "niter": 4},
        *(X, {}, "450431766004117320640183266504317667041173206400832665048116", 668904574, 1.672685463032396, 4),
    ),
    "to_the_end": (
        {"tol": 0, "niter": 100},
        *(X, {}, "651642308156227435561274300516423001562274355611743005167220", 3216459466, 1.7261768690077588, 5),
    ),
    "spherical": (
        {"spherical": True},
        *(X, {}, "721646358227664438861604355216463551276644388711043552160615", None, 19.67541116476059, 4),
    ),
    "dropped": (
        {"max_dropped": 0.1},
        *(WITH_NAN, {}, "3228764-5223661742582817455228764550236617425322174552281665", 2366387506, 1.729594023548998, 5),
    ),
    "init": (
        {"niter": 3},
        *(X, {"init": X[:9]}, "012345678223554462732344677123456776235544627022446771234557", 2335970096, 1.946705228405337, 3),
    ),
    "reseeded": (
        {"tol": 0},
        X,
        {"init": X[[0, 0, 0, 0, 0, 0, 0, 0, 1]]},
        *("588510644885006128458031244885106442850061284588312448857004", 2873706675, 1.9807674338771903, 6),
    ),
    "index": (
        {"seed": 2},
        X,
        {"index": torch.arange(60) * 7 % 61},
        *("865831300558112340085723400658313005581123400855234006582170", 2160865137, 1.7101958316125112, 5),
    ),
    "far_half": (
        {},
        (X + 8).half(),
        {},
        *("651642308156227435561274300516423001562274355611743005167220", 719593158, 1.7302820495679043, 4),
    ),
}


@pytest.mark.parametrize("estimator", [KMeans, EpisodicClusterer])
@pytest.mark.parametrize("case", OF_VERSION_06)
def test_results_are_those_of_0_6(case, estimator):
    settings, x, arguments, labels, checksum, objective, iterations = OF_VERSION_06[case]
    if "init" not in arguments and not torch.allclose(
        exponential_keys(0, 0, 0, 4), torch.tensor([0.0422, 0.5305, 0.1192, 2.0369]), atol=1e-4
    ):
        pytest.skip("this build of torch draws other random numbers")
    result = estimator(9, backend="torch", **settings).fit(x, **arguments)
    assert "".join("-" if label < 0 else str(int(label)) for label in result.labels) == labels
    if checksum is not None:  # directions are normalised, and the order of that sum is the machine's
        assert zlib.crc32(result.centroids.numpy().tobytes()) == checksum
    assert result.objective == pytest.approx(objective, rel=1e-6)
    assert len(result.report.objectives) == iterations


@pytest.mark.parametrize("backend", ["auto", "torch", "faiss"])
@pytest.mark.parametrize(
    "settings", [{}, {"niter": 3, "nredo": 2, "seed": 4}, {"spherical": True, "tol": 0}, {"max_dropped": 0.5}], ids=str
)
def test_a_clusterer_fits_as_kmeans_does(backend, settings):
    x = unit(300, 6, dtype=torch.float32)
    if "max_dropped" in settings:
        x[:20] = torch.nan
    one, other = (estimator(25, backend=backend, **settings).fit(x) for estimator in (KMeans, EpisodicClusterer))
    for name in ("centroids", "labels", "counts"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.objective, one.dropped, one.report.objectives) == (other.objective, other.dropped, other.report.objectives)


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
    assert sum(rows) == 3000
    assert max(rows) <= 1024


@pytest.mark.parametrize(
    ("x", "num_labels", "error", "message"),
    [
        (torch.ones(4, 3), 1, ValueError, r"x must have width 2 as the centroids, got shape \(4, 3\)"),
        (torch.ones(2), 1, ValueError, "x must have 2 dimensions"),
        (torch.ones(4, 2).long(), 1, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        ([[1.0, 2.0]], 1, TypeError, "x must be a torch.Tensor, got list"),
        (torch.full((4, 2), 1e20), 1, ValueError, "x must be small enough for float32"),
        (torch.full((4, 2), 1e300, dtype=torch.float64), 1, ValueError, "x must be small enough for float32"),
        (torch.ones(4, 2), 4, ValueError, "num_labels must be at most the number of centroids, 3, got 4"),
        (torch.ones(4, 2), 0, ValueError, "num_labels must be at least 1, got 0"),
        (torch.ones(4, 2), 1.0, TypeError, "num_labels must be an int, got float"),
    ],
)
def test_bad_rows_to_predict_are_named(x, num_labels, error, message):
    result = KMeans(3).fit(torch.randn(30, 2, generator=seeded(0)))
    with pytest.raises(error, match=message):
        result.predict(x, num_labels)


def test_a_repr_says_what_it_is():
    kmeans = KMeans(3, seed=7, tol=0, spherical=True)
    assert repr(kmeans) == (
        "KMeans(3, niter=20, nredo=1, backend='auto', spherical=True, seed=7, device=None, tol=0, max_dropped=0.01, "
        "process_group=None)"
    )
    assert repr(EpisodicClusterer(4)).startswith("EpisodicClusterer(4, niter=20, ")
    assert repr(EpisodicClusterer(4, warm_start=True)).endswith(", process_group=None, warm_start=True)")
    result = KMeans(3).fit(torch.tensor([[0.0, 0.0], [2.0, 0.0], [7.0, 0.0], [9.0, 0.0], [20.0, 0.0]]))
    assert repr(result) == "KMeansResult(num_clusters=3, width=2, rows=5, objective=4, empty=0, dropped=0, backend='torch')"
