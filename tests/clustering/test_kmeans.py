"""KMeans.fit, which is EpisodicClusterer.fit under other names: K-means of features."""

import random
import sys
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import dense
import faiss
import numpy as np
import pytest
import torch
from cases import unit
from helpers import blobs, in_new_process, same_partition, seeded

from protoclip_losses import EpisodicClusterer, KMeans
from protoclip_losses.clustering.assign import assign


@pytest.fixture(params=["faiss", "torch"])
def backend(request):
    return request.param


def squared_distances(features, centroids):
    """(N, K) in float64, from the differences."""
    return (features.double()[:, None] - centroids.double()[None]).square().sum(2)


def assert_consistent(features, clusters, num_clusters):
    """Labels, counts and objective are those of the centroids, computed in float64."""
    distances = squared_distances(features, clusters.centroids)
    nearest, second = distances.topk(2, largest=False).values.T if num_clusters > 1 else (distances[:, 0], None)
    chosen = distances.gather(1, clusters.labels[:, None])[:, 0]
    tolerance = 1e-5 * (1 + features.double().square().sum(1))
    assert (chosen <= nearest + tolerance).all()
    if second is not None:
        clear = second > nearest + tolerance
        assert torch.equal(clusters.labels[clear], distances.argmin(1)[clear])
    assert torch.equal(clusters.counts, torch.bincount(clusters.labels, minlength=num_clusters))
    assert clusters.objective == pytest.approx(float(chosen.sum()), rel=1e-5, abs=1e-8)
    assert clusters.centroids.shape == (num_clusters, features.shape[1])
    assert clusters.centroids.dtype == torch.float32
    assert clusters.labels.dtype == clusters.counts.dtype == torch.int64
    assert isinstance(clusters.objective, float)


def assert_close(centroids, expected):
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(centroids, expected, rtol=0, atol=1e-5)


def faiss_centroids(features, num_clusters, **settings):
    """faiss itself, told to use every point."""
    points = features.float().numpy()
    every = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    engine = faiss.Kmeans(points.shape[1], num_clusters, **{**every, **settings})
    engine.train(points)
    return torch.from_numpy(engine.centroids.copy())


@pytest.mark.parametrize(("rows", "width", "num_clusters"), [(300, 8, 20), (2600, 3, 7), (50, 1, 5), (12, 4, 1), (3, 2, 2)])
def test_labels_counts_and_objective_are_those_of_the_centroids(backend, rows, width, num_clusters):
    features = torch.randn(rows, width, generator=seeded(rows))
    clusters = KMeans(num_clusters, backend=backend).fit(features)
    assert_consistent(features, clusters, num_clusters)
    assert clusters.dropped == 0


@pytest.mark.parametrize("rows", [1, 3000])
def test_assignment_takes_the_lowest_id_among_equals(rows):
    centroids = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    labels, distances = assign(torch.zeros(rows, 2), centroids)
    assert labels.unique().tolist() == [1]
    assert distances.unique().tolist() == [1.0]


def test_assignment_weighs_the_norms_of_centroids():
    labels, distances = assign(torch.tensor([[1.0, 0.0], [4.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.5, 0.0]]))
    assert labels.tolist() == [1, 0]
    assert distances.tolist() == [0.25, 1.0]


def test_separated_blobs_are_found_exactly(backend):
    features, groups = blobs(clusters=6, each=9, width=5)
    clusters = KMeans(6, nredo=20, backend=backend).fit(features)
    assert same_partition(clusters.labels, groups)
    assert clusters.counts.tolist() == [9] * 6


@pytest.mark.parametrize("offset", [100.0, 10_000.0])
def test_features_far_from_the_origin_are_clustered_as_well_as_others(backend, offset):
    features, groups = blobs(clusters=4, each=50, width=8)
    features = features / 10 + offset
    clusters = KMeans(4, nredo=3, backend=backend).fit(features)
    assert same_partition(clusters.labels, groups)
    means, _ = dense.back_translate(groups, features, 4)
    assert clusters.objective == pytest.approx(float((features.double() - means[groups]).square().sum()), rel=0.5)


@pytest.mark.parametrize(
    ("rows", "num_clusters"), [(2000, 4), (150, 10), (12, 10)], ids=["more_than_256_each", "15_each", "hardly_one_each"]
)
def test_faiss_is_used_on_every_point_without_a_word(rows, num_clusters, capfd):
    features = torch.randn(rows, 6, generator=seeded(1))
    settings = {"niter": 5, "nredo": 2, "seed": 3}
    expected = faiss_centroids(features, num_clusters, **settings)
    capfd.readouterr()
    clusters = KMeans(num_clusters, **settings, backend="faiss").fit(features)
    assert capfd.readouterr() == ("", "")
    assert_close(clusters.centroids, expected)


def test_subsampling_would_have_given_other_centroids():
    features = torch.randn(2000, 6, generator=seeded(1))
    subsampled = faiss_centroids(features, 4, max_points_per_centroid=256, seed=0)
    assert not torch.allclose(KMeans(4, backend="faiss").fit(features).centroids, subsampled, atol=1e-3)


@pytest.mark.parametrize("setting", [{"niter": 1}, {"nredo": 4}, {"seed": 1}])
def test_every_setting_reaches_faiss(setting):
    features = torch.randn(400, 6, generator=seeded(2))
    settings = {"niter": 20, "nredo": 1, "seed": 0, **setting}
    clusters = KMeans(30, **setting, backend="faiss").fit(features)
    assert_close(clusters.centroids, faiss_centroids(features, 30, **settings))
    assert not torch.allclose(clusters.centroids, KMeans(30, backend="faiss").fit(features).centroids, atol=1e-3)


def test_the_same_seed_gives_the_same_bits(backend):
    features = torch.randn(500, 8, generator=seeded(3))
    first, second = (KMeans(20, seed=5, backend=backend).fit(features) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.labels, second.labels)
    assert first.objective == second.objective


def test_features_threads_and_random_states_are_left_as_found(backend):
    features = torch.randn(200, 4, generator=seeded(4), requires_grad=True)
    before = features.detach().clone()

    def settings():
        numpy_state = np.random.get_state()
        return (
            torch.get_rng_state().tolist(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
            random.getstate(),
            torch.get_num_threads(),
            faiss.omp_get_max_threads(),
        )

    found = settings()
    clusters = KMeans(5, nredo=2, backend=backend).fit(features)
    assert settings() == found
    assert torch.equal(features, before)
    assert not clusters.centroids.requires_grad


def test_a_clustering_is_a_constant():
    with pytest.raises(FrozenInstanceError):
        KMeans(1).fit(torch.ones(2, 2)).counts = None


def test_rows_with_nan_or_inf_are_dropped_counted_and_labelled_minus_one(backend):
    features = torch.randn(200, 4, generator=seeded(5))
    features[7, 1], features[60, 0], features[61, 3] = torch.nan, torch.inf, -torch.inf
    kept = features.isfinite().all(1)
    clusters = KMeans(6, max_dropped=0.02, backend=backend).fit(features)
    without = KMeans(6, backend=backend).fit(features[kept])
    assert clusters.dropped == 3
    assert (clusters.labels == -1).nonzero().flatten().tolist() == [7, 60, 61]
    assert torch.equal(clusters.labels[kept], without.labels)
    assert torch.equal(clusters.centroids, without.centroids)
    assert torch.equal(clusters.counts, without.counts)
    assert clusters.objective == without.objective


def test_a_share_of_bad_rows_above_max_dropped_is_an_error():
    features = torch.randn(100, 4, generator=seeded(6))
    features[3] = torch.nan
    assert KMeans(2).fit(features).dropped == 1
    features[4] = torch.nan
    with pytest.raises(ValueError, match=r"x must hold NaN or Inf in at most max_dropped=0.01 of its rows, got 2 of 100"):
        KMeans(2).fit(features)
    assert KMeans(2, max_dropped=0.02).fit(features).dropped == 2
    features[:97] = torch.nan
    assert KMeans(2, max_dropped=1).fit(features).dropped == 97
    features[98] = torch.nan
    assert KMeans(2, max_dropped=1).fit(features).counts.sum() == 2
    features[99] = torch.nan
    with pytest.raises(ValueError, match=r"x must have at least as many finite rows as num_clusters=2, got 1"):
        KMeans(2, max_dropped=1).fit(features)


def test_max_dropped_zero_allows_none():
    features = torch.zeros(1000, 2)
    assert KMeans(1, max_dropped=0).fit(features).dropped == 0
    features[0, 0] = torch.nan
    with pytest.raises(ValueError, match="max_dropped=0 of"):
        KMeans(1, max_dropped=0).fit(features)


def test_more_prototypes_than_rows_is_an_error():
    with pytest.raises(ValueError, match=r"as num_clusters=6, got 5"):
        KMeans(6).fit(torch.randn(5, 3))


def test_as_many_prototypes_as_rows_gives_each_row_its_own(backend):
    features = torch.randn(9, 3, generator=seeded(7))
    clusters = KMeans(9, backend=backend).fit(features)
    assert clusters.counts.tolist() == [1] * 9
    assert clusters.objective == pytest.approx(0, abs=1e-10)
    assert_close(clusters.centroids[clusters.labels], features)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_features_share_one_cluster(backend, value):
    features = torch.full((30, 3), value)
    clusters = KMeans(4, backend=backend).fit(features)
    assert_consistent(features, clusters, 4)
    assert clusters.centroids.isfinite().all()
    assert clusters.counts.max() == 30


def test_fewer_distinct_points_than_prototypes_leave_empty_clusters(backend):
    features = torch.eye(3).repeat(10, 1)
    clusters = KMeans(5, backend=backend).fit(features)
    assert_consistent(features, clusters, 5)
    assert same_partition(clusters.labels, torch.arange(3).repeat(10))
    assert sorted(clusters.counts.tolist()) == [0, 0, 10, 10, 10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_clustered_in_float32(backend, dtype):
    features = torch.randn(200, 4, generator=seeded(8)).to(dtype)
    clusters, plain = (
        KMeans(8, backend=backend).fit(features),
        KMeans(8, backend=backend).fit(features.float()),
    )
    assert clusters.centroids.dtype == torch.float32
    assert torch.equal(clusters.centroids, plain.centroids)
    assert torch.equal(clusters.labels, plain.labels)
    assert clusters.objective == plain.objective


def test_a_view_with_strides_is_clustered_like_its_copy(backend):
    wide = torch.randn(100, 8, generator=seeded(9))
    assert torch.equal(
        KMeans(5, backend=backend).fit(wide[:, ::2]).labels,
        KMeans(5, backend=backend).fit(wide[:, ::2].clone()).labels,
    )


def test_spherical_centroids_have_length_one(backend):
    features = 3 * unit(300, 5, 10, torch.float32) + 0.5
    clusters = KMeans(12, spherical=True, backend=backend).fit(features)
    assert torch.allclose(clusters.centroids.norm(dim=1), torch.ones(12), atol=1e-5)
    if backend == "faiss":
        assert_close(clusters.centroids, faiss_centroids(features, 12, niter=20, spherical=True, seed=0))
    assert_consistent(features, clusters, 12)
    plain = KMeans(12, backend=backend).fit(features)
    assert not torch.allclose(plain.centroids.norm(dim=1), torch.ones(12), atol=1e-1)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has GPU support")
def test_a_gpu_without_gpu_faiss_says_what_to_install():
    with pytest.raises(RuntimeError, match=r"device='cuda:1' asks faiss for a GPU .* pip install faiss-gpu-cu12"):
        KMeans(2, backend="faiss", device="cuda:1").fit(torch.randn(8, 2))


def test_gpu_faiss_that_sees_no_gpu_says_where_to_look(monkeypatch):
    """Another error than that of a faiss without GPU support, which installing another faiss would mend."""
    if not hasattr(faiss, "StandardGpuResources"):
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    elif faiss.get_num_gpus():
        pytest.skip("faiss sees a GPU")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeError, match=rf"device='{device}' asks faiss for a GPU but faiss .* sees none: .*nvidia-smi"):
            KMeans(2, backend="faiss", device=device).fit(torch.randn(8, 2))


@pytest.fixture
def four_gpus(monkeypatch):
    """The numbers of the GPUs that faiss takes, on a machine of four.

    faiss's own Python chooses them. What a build for the CPU lacks is put in its place: two containers of resources, and the one
    function that would copy an index to GPUs, which leaves it on the CPU.
    """
    taken = []
    in_gpu_wrappers = {
        "StandardGpuResources": object,
        "GpuResourcesVector": lambda: SimpleNamespace(push_back=lambda resource: None),
        "index_cpu_to_gpu_multiple": lambda resources, gpus, index, options: (
            taken.append([gpus.at(i) for i in range(gpus.size())]),
            index,
        )[1],
        "get_num_gpus": lambda: 4,
    }
    for name, value in in_gpu_wrappers.items():
        monkeypatch.setattr(faiss.gpu_wrappers, name, value, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    for module in (faiss, faiss.extra_wrappers):
        monkeypatch.setattr(module, "get_num_gpus", lambda: 4)
    return taken


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_faiss_takes_the_gpu_that_was_named_and_no_other(four_gpus, number, spherical):
    features = torch.randn(50, 2, generator=seeded(11))
    on_gpu = KMeans(3, backend="faiss", device=f"cuda:{number}", spherical=spherical).fit(features)
    assert four_gpus == [[number]]
    assert torch.equal(KMeans(3, backend="faiss", spherical=spherical).fit(features).centroids, on_gpu.centroids)
    assert four_gpus == [[number]]


def test_faiss_takes_the_current_gpu_if_none_is_named(four_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    KMeans(3, backend="faiss", device="cuda").fit(torch.randn(50, 2, generator=seeded(11)))
    assert four_gpus == [[2]]


def test_a_gpu_that_faiss_does_not_see_is_named(four_gpus):
    with pytest.raises(RuntimeError, match="device must be one of the 4 GPUs that faiss sees, got 'cuda:4'"):
        KMeans(3, backend="faiss", device="cuda:4").fit(torch.randn(50, 2))


@pytest.mark.parametrize(("asked", "taken"), [(1, [0, 1, 2, 3]), (2, [0, 1])])
def test_what_faiss_takes_for_a_number_of_gpus(four_gpus, asked, taken):
    """Why the number is not passed: 1 is all of them."""
    faiss.Kmeans(2, 3, gpu=asked)
    assert four_gpus == [taken]


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        KMeans(2, backend="faiss").fit(torch.randn(8, 2))


BOTH = pytest.mark.parametrize(  # and what their errors call the rows and the number of clusters
    ("estimator", "rows", "count"), [(KMeans, "x", "num_clusters"), (EpisodicClusterer, "features", "num_prototypes")]
)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"COUNT": 0}, ValueError, "COUNT must be at least 1, got 0"),
        ({"COUNT": 2.0}, TypeError, "COUNT must be an int, got float"),
        ({"COUNT": True}, TypeError, "COUNT must be an int, got bool"),
        ({"niter": 0}, ValueError, "niter must be at least 1"),
        ({"tol": 1.0}, ValueError, r"tol must be a share in \[0, 1\), got 1.0"),
        ({"tol": -0.1}, ValueError, r"tol must be a share in \[0, 1\), got -0.1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"nredo": 0}, ValueError, "nredo must be at least 1"),
        ({"backend": "sklearn"}, ValueError, "backend must be one of auto, faiss, torch, got 'sklearn'"),
        ({"max_dropped": -0.1}, ValueError, r"max_dropped must be a share in \[0, 1\], got -0.1"),
        ({"max_dropped": 1.5}, ValueError, r"max_dropped must be a share in \[0, 1\], got 1.5"),
        ({"max_dropped": float("nan")}, ValueError, r"max_dropped must be a share in \[0, 1\], got nan"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
        ({"process_group": True}, TypeError, r"process_group must be None .*, got True"),
    ],
)
@BOTH
def test_bad_settings_are_named(estimator, rows, count, arguments, error, message):
    with pytest.raises(error, match=message.replace("COUNT", count)):
        estimator(**{count: 2, **{name.replace("COUNT", count): value for name, value in arguments.items()}})


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(4, 0), ValueError, "ROWS must have a width of at least 1, got 0"),
        (torch.ones(4, 2).long(), TypeError, "ROWS must be float16, bfloat16, float32 or float64, got torch.int64"),
        (torch.ones(4), ValueError, r"ROWS must have 2 dimensions \(rows, width\), got shape \(4,\)"),
        ([[1.0, 2.0], [3.0, 4.0]], TypeError, "ROWS must be a torch.Tensor, got list"),
        (None, TypeError, "ROWS must be a torch.Tensor, got NoneType"),
        (torch.ones(0, 2), ValueError, "COUNT=2, got 0"),
    ],
)
@BOTH
def test_bad_features_are_named(estimator, rows, count, features, error, message):
    with pytest.raises(error, match=message.replace("ROWS", rows).replace("COUNT", count)):
        estimator(2).fit(features)


def test_features_out_of_the_range_of_float32_are_an_error_and_not_the_end_of_the_process():
    in_new_process(
        """
import torch
from protoclip_losses import KMeans
for backend in ("torch", "faiss"):
    for features in torch.full((9, 4), 2e38), torch.full((9, 4), 1e300, dtype=torch.float64), torch.ones(9, 0):
        try:
            KMeans(4, backend=backend).fit(features)
        except ValueError as error:
            assert str(error).startswith("x must "), error
        else:
            raise AssertionError(features)
    assert KMeans(4, backend=backend).fit(torch.full((9, 4), 9e37)).objective == 0
"""
    )


def test_a_repr_says_what_it_is():
    kmeans = KMeans(3, seed=7, tol=0, spherical=True)
    assert repr(kmeans) == (
        "KMeans(3, niter=20, nredo=1, backend='auto', spherical=True, seed=7, device=None, tol=0, max_dropped=0.01, "
        "max_cluster_size=None, process_group=None)"
    )
    assert repr(EpisodicClusterer(4)).startswith("EpisodicClusterer(4, niter=20, ")
    assert repr(EpisodicClusterer(4, warm_start=True)).endswith(", process_group=None, warm_start=True)")
    result = KMeans(3).fit(torch.tensor([[0.0, 0.0], [2.0, 0.0], [7.0, 0.0], [9.0, 0.0], [20.0, 0.0]]))
    assert repr(result) == "KMeansResult(num_clusters=3, width=2, rows=5, objective=4, empty=0, dropped=0, backend='torch')"


def test_importing_the_library_is_light_and_silent():
    heavy = "{'faiss', 'matplotlib', 'sklearn', 'transformers', 'PIL', 'scipy', 'pandas'}"
    assert in_new_process(f"import sys, protoclip_losses; assert not {heavy} & sys.modules.keys()") == ""
