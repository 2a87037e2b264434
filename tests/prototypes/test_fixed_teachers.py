"""Teachers that are clustered once for the whole data set, and several labels for a sample."""

import copy
import sys

import numpy as np
import pytest
import torch
from cases import unit
from helpers import in_new_process

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, KMeansResult, ProtoLoss, TeacherAdapter
from protoclip_losses.prototypes import Clustering

N, K, D = 60, 6, 4
TEACHER = unit(N, 5, 1, torch.float32)
IMAGE, TEXT = unit(N, D, 2, torch.float32), unit(N, D, 3, torch.float32)


def bank_of(index):
    return FeatureBank.from_features(index, image=IMAGE[index], text=TEXT[index])


def means(features, labels, num):
    """Dense float64 means, straight from the equation, and how many samples each label has; labels (N,) or (N, L)."""
    onehot = torch.nn.functional.one_hot(labels.reshape(len(labels), -1) + 1, num + 1)[..., 1:].sum(1).double()
    counts = onehot.sum(0)
    return onehot.T @ features.double() / counts.clamp(min=1)[:, None], counts


EPISODE = torch.arange(N).flip(0)[5:35]


@pytest.fixture(scope="module")
def fixed():
    return EpisodicClusterer(K).fit_teacher(TeacherAdapter.from_tensor(TEACHER))


def test_a_teacher_is_clustered_over_all_its_samples(fixed):
    result = KMeans(K).fit(TEACHER)
    assert torch.equal(fixed.centroids, result.centroids)
    assert torch.equal(fixed.labels, result.labels)
    assert torch.equal(fixed.labels, torch.cdist(TEACHER.double(), fixed.centroids.double()).argmin(1))


@pytest.mark.parametrize("kind", ["clustering", "result"])
def test_labels_are_by_sample_index_and_prototypes_are_the_means_of_the_episode(fixed, kind):
    teacher = fixed if kind == "clustering" else KMeans(K).fit(TEACHER)
    prototypes = EpisodicClusterer(3).build(bank_of(EPISODE), {"words": teacher}, internal=False)
    assert set(prototypes.terms) == {("image", "words"), ("text", "words")}
    assert prototypes.report.clusterings == {}
    at = prototypes.positions(EPISODE)
    for student, features in (("image", IMAGE), ("text", TEXT)):
        term = prototypes.terms[student, "words"]
        wanted, counts = means(features[EPISODE], fixed.labels[EPISODE], K)
        assert torch.allclose(term.prototypes.double(), wanted, atol=1e-6)
        assert torch.equal(term.valid, counts > 0)
        assert torch.equal(term.labels[at], fixed.labels[EPISODE])
        assert torch.equal(term.teacher_centroids, fixed.centroids)


@pytest.mark.parametrize("form", ["saved", "int32", "mapped_int32", "index"])
def test_labels_of_a_whole_data_set_may_be_narrow_on_the_disk_or_in_another_order(fixed, form, tmp_path):
    result = KMeans(K).fit(TEACHER)
    if form == "saved":
        result.save(tmp_path / "clusters")
        teacher = KMeansResult.load(tmp_path / "clusters")
    elif form == "index":
        order = torch.randperm(len(TEACHER), generator=torch.Generator().manual_seed(1))
        teacher = KMeans(K).fit(TEACHER[order], index=order)
    else:
        labels = result.labels.int()
        if form == "mapped_int32":
            np.save(tmp_path / "labels.npy", labels.numpy())
            labels = torch.from_numpy(np.load(tmp_path / "labels.npy", mmap_mode="c"))
        teacher = Clustering(result.centroids, labels)
    built = EpisodicClusterer(3).build(bank_of(EPISODE), {"words": teacher}, internal=False)
    expected = EpisodicClusterer(3).build(bank_of(EPISODE), {"words": fixed}, internal=False)
    for pair, term in expected.terms.items():
        assert built.terms[pair].labels.dtype == torch.int64
        assert torch.equal(built.terms[pair].labels, term.labels)
        assert torch.allclose(built.terms[pair].prototypes, term.prototypes, atol=1e-6)


def test_labels_are_checked_once_and_again_when_they_were_written_to(monkeypatch):
    """A pass over the labels of a whole data set belongs to the first episode alone."""
    passes, aminmax = [], torch.Tensor.aminmax

    def counted_aminmax(x, **more):
        passes.append(x.numel())
        return aminmax(x, **more)

    result = KMeans(K).fit(TEACHER, index=torch.arange(N).flip(0))
    monkeypatch.setattr(torch.Tensor, "aminmax", counted_aminmax)
    first, second = (
        EpisodicClusterer(3).build(bank_of(EPISODE), {"t": result}, internal=False).terms["image", "t"] for _ in range(2)
    )
    assert passes.count(N) == 2  # of index and labels, in the first build
    assert torch.equal(first.labels, second.labels)
    other = KMeans(K).fit(TEACHER, index=torch.arange(N).flip(0))
    EpisodicClusterer(3).build(bank_of(EPISODE), {"t": other}, internal=False)
    assert passes.count(N) == 4  # another result is looked at for itself
    result.labels[N - 1 - EPISODE[0]] = K
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {K}\) or be -1, got {K} at position {EPISODE[0]}"):
        EpisodicClusterer(3).build(bank_of(EPISODE), {"t": result}, internal=False)


def test_the_checksum_is_kept_until_a_tensor_is_written_to():
    labels, centroids = torch.tensor([0, 1, 2]), torch.eye(3)
    clustering = Clustering(centroids, labels)
    first = clustering.checksum()
    assert clustering.checksum() == first == Clustering(centroids.clone(), labels.clone()).checksum()
    labels[0] = 1
    second = clustering.checksum()
    assert second == Clustering(centroids, labels.clone()).checksum() != first
    centroids[0, 0] = 2
    assert clustering.checksum() == Clustering(centroids.clone(), labels).checksum() != second
    copied = copy.deepcopy(clustering)
    copied.labels[0] = 2
    assert copied.checksum() == Clustering(centroids, copied.labels.clone()).checksum()
    with torch.inference_mode():
        uncounted = Clustering(torch.eye(3), torch.tensor([0, 1, 2]))
        assert uncounted.checksum() == first
        uncounted.labels[0] = 1
        assert uncounted.checksum() == Clustering(torch.eye(3), torch.tensor([1, 1, 2])).checksum()


def test_ids_that_are_no_sample_indices_are_an_error():
    teacher = KMeans(K).fit(TEACHER, index=torch.arange(len(TEACHER)) + 10**12)
    with pytest.raises(ValueError, match="teacher 'words' must have sample indices in its index, got ids from 1000000000000 to"):
        EpisodicClusterer(3).build(bank_of(EPISODE), {"words": teacher}, internal=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_labels_of_a_large_data_set_are_not_copied(tmp_path):
    """Those of the episode are looked up alone: 16 MB of labels stay in their file."""
    in_new_process(
        f"""
import threading, time
from pathlib import Path
import torch
from protoclip_losses import ClusteringReport, EpisodicClusterer, FeatureBank, KMeansResult

def anonymous():
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")).split()[1]) / 1024

report = ClusteringReport("torch", "", (1.0,), 1.0, 1.0, 0, 0, 0, {{}})
labels, path = torch.arange(2_000_000) % 9, {str(tmp_path / "clusters")!r}
KMeansResult(torch.randn(9, 4), labels, torch.bincount(labels), 1.0, report).save(path)
del labels
index = torch.arange(0, 2_000_000, 2_000)
bank = FeatureBank.from_features(index, image=torch.randn(1000, 4), text=torch.randn(1000, 4))
teacher, peak, before = KMeansResult.load(path), [0], anonymous()
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
built = EpisodicClusterer(3).build(bank, {{"words": teacher}}, internal=False)
assert torch.equal(built.terms["image", "words"].labels, index % 9)
assert peak[0] - before < 8, peak[0] - before
"""
    )


def test_fixed_and_episodic_teachers_are_built_together(fixed):
    teachers = {"words": fixed, "model": TeacherAdapter.from_tensor(TEACHER)}
    prototypes = EpisodicClusterer(3).build(bank_of(EPISODE), teachers)
    alone = EpisodicClusterer(3).build(bank_of(EPISODE), {"model": TeacherAdapter.from_tensor(TEACHER)})
    assert set(prototypes.report.clusterings) == {"image", "text", "model"}
    for key, term in alone.terms.items():
        assert torch.equal(prototypes.terms[key].prototypes, term.prototypes)
    assert len(prototypes.terms["image", "words"].prototypes) == K


def test_without_internal_no_modality_is_clustered():
    prototypes = EpisodicClusterer(3).build(bank_of(EPISODE), [TeacherAdapter.from_tensor(TEACHER)], internal=False)
    assert set(prototypes.terms) == {("image", "teacher0"), ("text", "teacher0")}
    assert set(prototypes.report.clusterings) == {"teacher0"}


def test_features_of_one_episode_serve_the_samples_of_the_next(fixed):
    after = torch.arange(0, N, 2)
    prototypes = EpisodicClusterer(3).build(bank_of(EPISODE), {"words": fixed}, internal=False, index=after)
    assert torch.equal(prototypes.index, after)
    term = prototypes.terms["image", "words"]
    wanted, counts = means(IMAGE[EPISODE], fixed.labels[EPISODE], K)
    assert torch.allclose(term.prototypes.double(), wanted, atol=1e-6)
    assert torch.equal(term.labels, fixed.labels[after].where(counts[fixed.labels[after]] > 0, -1))


def test_a_label_that_no_sample_of_the_bank_has_becomes_none_and_is_counted(fixed):
    few = (fixed.labels < 2).nonzero()[:, 0]
    prototypes = EpisodicClusterer(3).build(bank_of(few), {"words": fixed}, internal=False, index=torch.arange(N))
    labels = prototypes.terms["text", "words"].labels
    assert torch.equal(labels, fixed.labels.where(fixed.labels < 2, -1))
    assert prototypes.report.unlabelled == {"words": N - len(few)}
    assert prototypes.report.scalars()["words/unlabelled"] == N - len(few)
    loss = ProtoLoss()
    loss.set_prototypes(prototypes)  # hard labels: an invalid one would raise
    assert torch.isfinite(loss(IMAGE, TEXT, 10.0, index=torch.arange(N)))


def test_rows_of_zeros_are_no_samples_of_a_teacher_and_get_no_label():
    rows = TEACHER.clone()
    rows[::7] = 0
    teacher = TeacherAdapter.from_tensor(rows)
    known = rows.any(1)
    alone = KMeans(K).fit(rows[known])
    clustering = EpisodicClusterer(K).fit_teacher(teacher)
    prototypes = EpisodicClusterer(K).build(bank_of(torch.arange(N)), {"t": teacher}, internal=False)
    for labels, centroids in (
        (clustering.labels, clustering.centroids),
        (prototypes.terms["image", "t"].labels, prototypes.terms["image", "t"].teacher_centroids),
    ):
        assert torch.equal(labels[known], alone.labels)
        assert torch.equal(centroids, alone.centroids)
        assert (labels[~known] == -1).all()
    assert prototypes.report.unlabelled == {"t": int((~known).sum())}


def test_a_row_of_zeros_of_a_modality_is_a_sample():
    image = IMAGE.clone()
    image[0] = 0
    bank = FeatureBank.from_features(torch.arange(N), image=image, text=TEXT)
    assert EpisodicClusterer(3).build(bank).terms["text", "image"].labels[0] >= 0


# --- several labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["episode", "fixed"])
def test_several_labels_are_the_nearest_centroids(where):
    clusterer, teacher = EpisodicClusterer(K, labels_per_sample=3), TeacherAdapter.from_tensor(TEACHER)
    if where == "fixed":
        clustering = clusterer.fit_teacher(teacher)
        prototypes = EpisodicClusterer(2).build(bank_of(torch.arange(N)), {"t": clustering}, internal=False)
    else:
        prototypes = clusterer.build(bank_of(torch.arange(N)), {"t": teacher}, internal=False)
    term = prototypes.terms["image", "t"]
    wanted = torch.cdist(TEACHER.double(), term.teacher_centroids.double()).argsort(1)[:, :3]
    assert torch.equal(term.labels, wanted)
    mean, _ = means(IMAGE, wanted, K)
    assert torch.allclose(term.prototypes.double(), mean, atol=1e-6)


def test_of_several_labels_the_ones_without_a_prototype_are_left_out():
    labels = torch.tensor([[0, 1], [1, 2], [2, -1], [3, 3]])
    clustering = Clustering(torch.eye(4), labels)
    prototypes = EpisodicClusterer(2).build(
        bank_of(torch.tensor([0, 2])), {"t": clustering}, internal=False, index=torch.arange(4)
    )
    assert prototypes.terms["image", "t"].labels.tolist() == [[0, 1], [1, 2], [2, -1], [-1, -1]]
    assert prototypes.report.unlabelled == {"t": 1}


def test_prototypes_with_several_labels_survive_their_state():
    clusterer = EpisodicClusterer(K, labels_per_sample=2)
    prototypes = clusterer.build(bank_of(EPISODE), {"t": TeacherAdapter.from_tensor(TEACHER)})
    again = type(prototypes).from_state_dict(prototypes.state_dict())
    for teacher, labels in prototypes.labels_by_teacher.items():
        assert torch.equal(again.labels_by_teacher[teacher], labels)
    after = clusterer.build(bank_of(EPISODE), {"t": TeacherAdapter.from_tensor(TEACHER)})
    assert after.report.drift["t"] == 0
    assert after.report.changed["t"] == 0


# --- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teachers", "settings", "error", "message"),
    [
        ({}, {"internal": False}, ValueError, "teachers must be given with internal=False"),
        ({"t": Clustering(torch.eye(3))}, {}, ValueError, "teacher 't' must have labels by sample index"),
        (
            {"t": Clustering(torch.eye(3), torch.zeros(9, dtype=torch.int64))},
            {},
            IndexError,
            "teacher 't' has labels of 9 samples",
        ),
        ({"image": Clustering(torch.eye(3), torch.zeros(N, dtype=torch.int64))}, {}, ValueError, "named like a modality"),
        ({"t": "fixed"}, {"index": torch.arange(3)}, ValueError, r"index must be None where \['image', 'text'\] are clustered"),
        (
            {"t": "fixed"},
            {"index": torch.tensor([N]), "internal": False},
            IndexError,
            "has labels of 60 samples: 1 of 1 are outside",
        ),
        ({"t": "fixed"}, {"index": torch.tensor([-1]), "internal": False}, IndexError, r"sample -1, for one"),
        ({"t": "fixed"}, {"index": torch.tensor([0.5]), "internal": False}, TypeError, "index must be int64"),
        ({"t": "fixed"}, {"index": torch.tensor([1, 1]), "internal": False}, ValueError, "each sample once"),
    ],
)
def test_bad_input(fixed, teachers, settings, error, message):
    teachers = {name: fixed if teacher == "fixed" else teacher for name, teacher in teachers.items()}
    with pytest.raises(error, match=message):
        EpisodicClusterer(3).build(bank_of(EPISODE), teachers, **settings)


def test_more_labels_than_prototypes_are_an_error():
    with pytest.raises(ValueError, match="labels_per_sample must be at most num_prototypes=3, got 4"):
        EpisodicClusterer(3, labels_per_sample=4)
    with pytest.raises(ValueError, match="labels_per_sample must be at least 1, got 0"):
        EpisodicClusterer(3, labels_per_sample=0)
