"""What a clustering says of itself, how it is compared with the episode before, and a start from there."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from cases import integers, unit
from helpers import in_new_process, seeded

from protoclip_losses import EpisodicClusterer, FeatureBank, Prototypes, TeacherAdapter
from protoclip_losses.clustering.agreement import adjusted_agreement

K, WIDTH = 7, 5
TEACHER = unit(200, 6, 3, torch.float32)


def bank_of(index, image, text):
    bank = FeatureBank(index, WIDTH)
    bank.update(index, image[index], text[index])
    return bank


def episode(seed=0, samples=120):
    return torch.randperm(200, generator=seeded(seed))[:samples]


IMAGE, TEXT = unit(200, WIDTH, 1, torch.float32), unit(200, WIDTH, 2, torch.float32)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("spherical", [False, True])
def test_a_report_holds_the_numbers_of_its_clustering(backend, spherical):
    features = unit(300, 6, dtype=torch.float32)
    features[5] = torch.nan
    clusters = EpisodicClusterer(30, backend=backend, spherical=spherical, niter=6, tol=0).fit(features)
    report = clusters.report
    assert report.backend == backend
    assert report.objective == clusters.objective
    assert len(report.objectives) == 6
    assert all(b <= a * (1 + 1e-6) for a, b in zip(report.objectives, [*report.objectives[1:], report.objective], strict=True))
    assert report.objective > 0.5 * report.objectives[0]
    shares = clusters.counts / 299
    assert report.imbalance == pytest.approx(30 * float((shares * shares).sum()), rel=1e-5)
    assert (report.dropped, report.empty) == (1, int((clusters.counts == 0).sum()))
    assert all(seconds > 0 for seconds in report.seconds.values())
    scalars = report.scalars()
    assert scalars["iterations"] == 6
    assert all(type(value) is float for value in scalars.values())
    with pytest.raises(FrozenInstanceError):
        report.empty = 3


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_faiss_and_torch_report_the_same_objectives_from_the_same_start(backend):
    features = unit(300, 6, dtype=torch.float32)
    init = features[:20]
    one, other = (EpisodicClusterer(20, backend=b, niter=4, tol=0).fit(features, init=init).report for b in (backend, "torch"))
    assert one.objectives == pytest.approx(other.objectives, rel=1e-5)


def test_imbalance_is_one_for_equal_clusters_and_k_for_a_single_one():
    assert EpisodicClusterer(4).fit(torch.eye(4)).report.imbalance == 1
    report = EpisodicClusterer(4).fit(torch.ones(20, 2)).report
    assert (report.imbalance, report.empty) == (4, 3)


def test_a_build_reports_every_clustering_and_how_they_agree():
    clusterer = EpisodicClusterer(K)
    prototypes = clusterer.build(bank_of(episode(), IMAGE, TEXT), {"t": TeacherAdapter.from_tensor(TEACHER)})
    report = prototypes.report
    assert clusterer.previous is prototypes
    assert report.clusterings.keys() == {"image", "text", "t"}
    assert {frozenset(pair) for pair in report.agreement} == {
        frozenset(p) for p in (("image", "text"), ("image", "t"), ("text", "t"))
    }
    labels = [prototypes.terms[pair].labels for pair in (("text", "image"), ("image", "text"))]
    pair = next(p for p in report.agreement if set(p) == {"image", "text"})
    assert report.agreement[pair] == pytest.approx(adjusted_agreement(*labels))
    assert report.drift == report.changed == {}
    scalars = report.scalars()
    assert {"image/objective", "t/seconds/kmeans", "seconds/back_translate", f"{pair[0]}-{pair[1]}/ami"} <= scalars.keys()
    assert all(type(value) is float for value in scalars.values())


def test_the_same_episode_again_has_neither_drift_nor_changed_labels():
    clusterer = EpisodicClusterer(K)
    for _ in range(2):
        report = clusterer.build(bank_of(episode(), IMAGE, TEXT)).report
    assert report.drift == pytest.approx({"image": 0, "text": 0}, abs=1e-6)
    assert report.changed == {"image": 0, "text": 0}


def test_drift_and_changed_labels_are_those_of_samples_in_both_episodes():
    clusterer = EpisodicClusterer(K)
    before = clusterer.build(bank_of(episode(0), IMAGE, TEXT))
    moved = IMAGE + 0.3 * unit(200, WIDTH, 9, torch.float32)
    now = clusterer.build(bank_of(episode(1), moved, TEXT))
    old, new = before.terms["text", "image"], now.terms["text", "image"]
    distances = torch.cdist(new.teacher_centroids.double(), old.teacher_centroids.double())
    assert now.report.drift["image"] == pytest.approx(float(distances.amin(1).mean()), rel=1e-5)
    nearest, place = distances.argmin(1), {int(i): p for p, i in enumerate(before.index)}
    rows = [(int(nearest[new.labels[p]]), int(old.labels[place[int(i)]])) for p, i in enumerate(now.index) if int(i) in place]
    changed = sum(a != b for a, b in rows) / len(rows)
    assert now.report.changed["image"] == pytest.approx(changed)
    assert 0 < changed < 1


def test_episodes_without_a_common_sample_have_drift_alone():
    clusterer = EpisodicClusterer(K)
    order = torch.randperm(200, generator=seeded(0))
    for index in order.split(100):
        report = clusterer.build(bank_of(index, IMAGE, TEXT)).report
    assert report.drift.keys() == {"image", "text"}
    assert report.changed == {}


def test_a_warm_start_keeps_the_numbers_of_prototypes():
    index = episode()
    nudged = IMAGE + 0.02 * unit(200, WIDTH, 9, torch.float32)
    same = {}
    for warm in (False, True):
        clusterer = EpisodicClusterer(K, warm_start=warm)
        first = clusterer.build(bank_of(index, IMAGE, TEXT))
        clusterer.seed = 5
        second = clusterer.build(bank_of(index, nudged, TEXT))
        same[warm] = float((first.terms["text", "image"].labels == second.terms["text", "image"].labels).double().mean())
    assert same[True] > 0.9
    assert same[False] < 0.5


def test_the_report_is_still_found_at_the_clusterer_with_a_warning():
    clusterer = EpisodicClusterer(K)
    with pytest.warns(FutureWarning, match=r"EpisodicClusterer.report is deprecated .*: use Prototypes.report"):
        assert clusterer.report is None
    prototypes = clusterer.build(bank_of(episode(), IMAGE, TEXT))
    assert prototypes.report is not None
    with pytest.warns(FutureWarning, match=r"EpisodicClusterer.report is deprecated") as warned:
        assert clusterer.report is prototypes.report
    assert warned[0].filename == __file__
    assert Prototypes.from_state_dict(prototypes.state_dict()).report.scalars() == {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": 2, "previous": None}, "state_dict of EpisodicClusterer must have format 1 or earlier, got 2"),
        ({"format": 1, "cursor": 0}, "state_dict must be that of EpisodicClusterer, got one without 'previous'"),
    ],
)
def test_a_state_of_something_else_is_an_error_and_changes_nothing(state, message):
    clusterer = EpisodicClusterer(K)
    prototypes = clusterer.build(bank_of(episode(), IMAGE, TEXT))
    with pytest.raises(ValueError, match=message):
        clusterer.load_state_dict(state)
    assert clusterer.previous is prototypes


@pytest.mark.parametrize("warm", [False, True])
def test_a_saved_clusterer_is_resumed_in_a_new_process(tmp_path, warm):
    settings = {"warm_start": warm}
    clusterer = EpisodicClusterer(K, **settings)
    assert clusterer.state_dict() == {"format": 1, "previous": None, "history": []}
    clusterer.build(bank_of(episode(0), IMAGE, TEXT))
    torch.save({"clusterer": clusterer.state_dict(), "index": episode(1)}, tmp_path / "state.pt")
    here = clusterer.build(bank_of(episode(1), IMAGE, TEXT))
    in_new_process(
        f"""
import sys, torch
from test_report import IMAGE, TEXT, K, bank_of
from protoclip_losses import EpisodicClusterer
state = torch.load(sys.argv[1] + "/state.pt", weights_only=True)
clusterer = EpisodicClusterer(K, warm_start={warm})
clusterer.load_state_dict({{"previous": None}})
assert clusterer.previous is None
clusterer.load_state_dict(state["clusterer"])
prototypes = clusterer.build(bank_of(state["index"], IMAGE, TEXT))
torch.save([prototypes.state_dict(), prototypes.report.drift, prototypes.report.changed], sys.argv[1] + "/out.pt")
""",
        tmp_path,
        folders=[Path(__file__).parent],
    )
    there, drift, changed = torch.load(tmp_path / "out.pt", weights_only=True)
    for mine, other in zip(here.state_dict()["terms"], there["terms"], strict=True):
        assert all(torch.equal(x, other[name]) for name, x in mine.items() if isinstance(x, torch.Tensor))
    assert (drift, changed) == (here.report.drift, here.report.changed)


@pytest.mark.parametrize(
    ("samples", "first", "second"), [(50, 5, 7), (300, 30, 4), (1000, 100, 120), (40, 40, 3), (10, 1, 3), (9, 9, 9), (12, 1, 1)]
)
def test_agreement_is_that_of_scikit_learn(samples, first, second):
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    a = integers(first, samples, 1)
    b = (3 * a + integers(2, samples, 2)) % second
    rand, information = adjusted_agreement(a, b)
    assert rand == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    assert information == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-9)
    unknown = torch.cat([a, torch.tensor([-1, 0])]), torch.cat([b, torch.tensor([0, -1])])
    assert adjusted_agreement(*unknown) == pytest.approx((rand, information), abs=1e-12)
