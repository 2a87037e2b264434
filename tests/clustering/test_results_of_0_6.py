"""Results are those of version 0.6, and a clusterer's are those of its KMeans."""

import zlib

import pytest
import torch
from cases import unit
from helpers import draws_as_recorded

from protoclip_losses import EpisodicClusterer, KMeans


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
    if not draws_as_recorded():
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
