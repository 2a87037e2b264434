"""Clustering, building and the metrics do not depend on what a process has set: default device and dtype, precision, modes."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import assert_equal

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, PrototypicalBackTranslation, TeacherAdapter, metrics
from protoclip_losses.teachers import PCA

pytestmark = pytest.mark.cpu_only

RANDOM = np.random.default_rng(0)
IMAGE, TEXT, TEACHER = (torch.from_numpy(RANDOM.standard_normal((400, width)).astype("float32")) for width in (24, 24, 40))
CLASSES = torch.from_numpy(RANDOM.integers(0, 9, 400))
INDEX = torch.arange(400)
FAR, CLUMPS = IMAGE.clone(), IMAGE.clone()  # in float32 and in float64
FAR[5] = 65504
CLUMPS[200:] += 1e4
FITS = {
    "plain": (IMAGE, {}, {}),
    "spherical": (IMAGE, {"spherical": True}, {}),
    "far": (FAR, {}, {}),
    "clumps": (CLUMPS, {}, {}),
    "tiny": (IMAGE * 1e-25, {}, {}),
    "start": (IMAGE, {}, {"init": IMAGE[:30]}),
    "runs": (IMAGE.half(), {"nredo": 2, "seed": 3, "tol": 0}, {}),
    "index": (IMAGE, {}, {"index": INDEX * 7 % 401}),
}


def without_time(report):
    return {name: value for name, value in report.scalars().items() if "seconds" not in name}


def fits(given):
    for backend in ("torch", "faiss"):
        for name, (x, settings, arguments) in FITS.items():
            result = KMeans(30, backend=backend, **settings).fit(given(x), **arguments)
            parts = result.centroids, result.labels, result.counts, result.predict(given(x)), result.predict(given(x[:50]), 3)
            assert not any(part.is_inference() or part.requires_grad for part in parts)
            yield f"{backend} {name}", (*parts, result.objective, without_time(result.report))


def builds(given):
    bank = FeatureBank.from_features(INDEX, image=given(IMAGE), text=given(TEXT))
    clusterer = EpisodicClusterer(30, warm_start=True)
    for episode in range(2):
        built = clusterer.build(bank, {"t": TeacherAdapter.from_tensor(given(TEACHER), 8)})
        assert not any(term.prototypes.is_inference() or term.prototypes.requires_grad for term in built.terms.values())
        yield f"build {episode}", (built.state_dict(), without_time(built.report))
        bank.update(INDEX[:40], TEXT[:40], IMAGE[:40])


def others(given):
    stream = PrototypicalBackTranslation(9)
    for part in INDEX.split(300):
        stream.update(CLASSES[part], given(IMAGE)[part])
    yield "back translation", (stream.compute(), stream.counts, PrototypicalBackTranslation(9).counts)
    pca = PCA.fit([given(TEACHER[:100]), given(TEACHER[100:])], 5)
    yield "pca", (pca.mean, pca.components, pca(TEACHER))
    image, text, classes, other = given(IMAGE), given(TEXT), CLASSES, CLASSES.flip(0)
    yield "agreement", (metrics.adjusted_rand_score(classes, other), metrics.adjusted_mutual_info_score(classes, other))
    yield (
        "recall",
        (metrics.retrieval_recall(image, text), metrics.retrieval_recall(image, image[:1].expand(400, -1), concepts=classes)),
    )
    classifier = metrics.zero_shot_classifier([text[2 * k : 2 * k + 2] for k in range(9)]).detach()
    yield "zero-shot", (classifier, metrics.zero_shot_accuracy(image, classes, classifier), metrics.modality_gap(image, text))
    yield (
        "grouping",
        (metrics.grouping(image, classes), metrics.linear_probe(image[:300], classes[:300], image[300:], classes[300:])),
    )


def results(given=lambda x: x):
    return {name: value for part in (fits, builds, others) for name, value in part(given)}


@contextmanager
def changed(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def process_settings():
    return torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_num_threads()


def product_precision():
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):
        return torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "medium"
    return backend.fp32_precision, lambda value: setattr(backend, "fp32_precision", value), "bf16"


SETTINGS = {
    "meta_device": lambda: torch.device("meta"),
    "float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "deterministic": lambda: changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "one_thread": lambda: changed(torch.get_num_threads, torch.set_num_threads, 1),
    "three_threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 3),
    "tf32": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "bfloat16_products": lambda: changed(lambda: product_precision()[0], product_precision()[1], product_precision()[2]),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def assert_results(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        try:
            assert_equal(value, found[name])
        except AssertionError as error:
            raise AssertionError(f"{name} differs") from error


@pytest.fixture(scope="module")
def expected():
    return results()


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_are_those_of_a_process_that_set_nothing(setting, expected):
    with SETTINGS[setting]():
        before = process_settings(), product_precision()[0]
        found = results()
        assert (process_settings(), product_precision()[0]) == before
    assert_results(found, expected)


@pytest.mark.filterwarnings("ignore:features .* were computed with gradients")
def test_features_with_a_graph_give_the_same(expected):
    assert_results(results(lambda x: x.clone().requires_grad_()), expected)
