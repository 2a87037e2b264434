"""EpisodicClusterer.build: the prototypes of an episode, and their state."""

from dataclasses import FrozenInstanceError

import dense
import pytest
import torch
from cases import assert_near, leaf, make_term, unit
from helpers import blobs, in_new_process, seeded

from protoclip_losses import EpisodicClusterer, FeatureBank, ProtoLoss, Prototypes, TeacherAdapter

SAMPLES, K, WIDTH = 120, 7, 5


def modality(seed, rows=SAMPLES, width=WIDTH):
    return unit(rows, width, seed, torch.float32)


def filled_bank(index, dtype=torch.float32, **features):
    """A bank of samples ``index`` whose features are rows ``index`` of the tensors given."""
    bank = FeatureBank(index, features["image"].shape[1], dtype=dtype)
    given = {name: x[index] for name, x in features.items()}
    bank.update(index, given.pop("image"), given.pop("text"), **given)
    return bank


def random_index(rows=SAMPLES, seed=0):
    return torch.randperm(rows, generator=seeded(seed))


def assert_terms_follow(prototypes, students, sources):
    """Every term is the nearest-centroid labelling of its teacher and the float64 means of its student.

    ``students`` and ``sources`` hold a row for every sample index of the data set.
    """
    assert set(prototypes.terms) == {(s, t) for s in students for t in sources if s != t}
    index = prototypes.index
    for (student, teacher), term in prototypes.terms.items():
        source, own = sources[teacher][index].double(), students[student][index]
        known = source.isfinite().all(1)
        nearest = (source[known, None] - term.teacher_centroids.double()).square().sum(2).argmin(1)
        assert torch.equal(term.labels[known], nearest)
        assert (term.labels[~known] == -1).all()
        labels = term.labels.where(own.isfinite().all(1), -1)
        means, counts = dense.back_translate(labels, own, len(term.prototypes))
        assert_near(term.prototypes, means, 1e-6)
        assert torch.equal(term.valid, counts > 0)


def test_each_modality_learns_from_the_other_and_from_every_teacher():
    image, text, teacher = modality(1), modality(2), modality(3, width=9)
    bank = filled_bank(random_index(), image=image, text=text)
    prototypes = EpisodicClusterer(K).build(bank, [TeacherAdapter.from_tensor(teacher)])
    assert list(prototypes.terms) == [("text", "image"), ("image", "text"), ("image", "teacher0"), ("text", "teacher0")]
    assert_terms_follow(prototypes, {"image": image, "text": text}, {"image": image, "text": text, "teacher0": teacher})
    assert prototypes.students == {"image", "text"}
    assert prototypes.external_teachers == {"teacher0"}


def test_students_of_one_teacher_share_its_clustering():
    prototypes = EpisodicClusterer(K).build(
        filled_bank(random_index(), image=modality(1), text=modality(2)), [TeacherAdapter.from_tensor(modality(3))]
    )
    one, other = prototypes.terms["image", "teacher0"], prototypes.terms["text", "teacher0"]
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.teacher_centroids, other.teacher_centroids)


@pytest.mark.parametrize(("as_mapping", "names"), [(False, {"teacher0", "teacher1"}), (True, {"roberta", "minilm"})])
def test_several_teachers_come_as_a_list_or_as_a_mapping_of_names(as_mapping, names):
    image, text, wide, narrow = modality(1), modality(2), modality(3, width=9), modality(4, width=3)
    given = [TeacherAdapter.from_tensor(wide), TeacherAdapter.from_tensor(narrow)]
    teachers = dict(zip(("roberta", "minilm"), given, strict=True)) if as_mapping else given
    prototypes = EpisodicClusterer(K).build(filled_bank(random_index(), image=image, text=text), teachers)
    first, second = ("roberta", "minilm") if as_mapping else ("teacher0", "teacher1")
    assert prototypes.external_teachers == names
    assert_terms_follow(prototypes, {"image": image, "text": text}, {"image": image, "text": text, first: wide, second: narrow})


def test_a_teacher_is_asked_for_the_samples_of_the_bank():
    teacher = modality(3, rows=1000)
    index = 5 * random_index(100) + 3
    features = {"image": modality(1, rows=1000), "text": modality(2, rows=1000)}
    prototypes = EpisodicClusterer(K).build(filled_bank(index, **features), {"t": TeacherAdapter.from_tensor(teacher)})
    assert torch.equal(prototypes.index, index.sort().values)
    assert_terms_follow(prototypes, features, {**features, "t": teacher})


def test_labels_are_looked_up_by_sample_in_any_order_of_the_bank():
    image, groups = blobs(clusters=4, each=30, width=WIDTH)
    features = {"image": image, "text": modality(2)}
    clusterer = EpisodicClusterer(4, nredo=20)
    partitions = []
    for seed in range(3):
        prototypes = clusterer.build(filled_bank(random_index(seed=seed), **features))
        labels = prototypes.terms["text", "image"].labels[prototypes.positions(torch.arange(SAMPLES))]
        partitions.append(labels)
    for labels in partitions:
        assert torch.stack([labels, groups]).unique(dim=1).shape[1] == 4


def test_empty_clusters_are_invalid_with_a_zero_row():
    image = torch.eye(WIDTH)[torch.arange(SAMPLES) % 3]
    prototypes = EpisodicClusterer(K).build(filled_bank(random_index(), image=image, text=modality(2)))
    term = prototypes.terms["text", "image"]
    assert term.valid.sum() == 3
    assert (term.prototypes[~term.valid] == 0).all()
    assert prototypes.terms["image", "text"].valid.all()


def test_a_cluster_of_one_sample_is_valid():
    prototypes = EpisodicClusterer(9).build(filled_bank(random_index(9), image=modality(1), text=modality(2)))
    term = prototypes.terms["image", "text"]
    assert term.valid.all()
    assert torch.equal(term.prototypes[term.labels], modality(1)[prototypes.index])


def test_a_bank_is_a_feature_bank():
    with pytest.raises(TypeError, match="bank must be a FeatureBank, got dict"):
        EpisodicClusterer(2).build({})


def test_a_bank_that_is_not_complete_is_an_error_with_the_count():
    bank = FeatureBank(torch.arange(10), dim=2)
    with pytest.raises(ValueError, match="no features were written for any of its 10 rows"):
        EpisodicClusterer(2).build(bank)
    bank.update(torch.arange(7), torch.ones(7, 2), torch.ones(7, 2))
    with pytest.raises(ValueError, match="3 of 10 rows were never written"):
        EpisodicClusterer(2).build(bank)


def test_a_repeated_sample_counts_once():
    features, index = {"image": modality(1), "text": modality(2)}, random_index()
    once = EpisodicClusterer(K).build(filled_bank(index, **features))
    twice = EpisodicClusterer(K).build(filled_bank(torch.cat([index, index[:50], index[20:30]]), **features))
    assert torch.equal(once.index, twice.index)
    for key, term in once.terms.items():
        for name in ("prototypes", "teacher_centroids", "labels", "valid"):
            assert torch.equal(getattr(term, name), getattr(twice.terms[key], name))


def test_a_teacher_without_a_sample_of_the_bank_is_an_index_error():
    bank = filled_bank(random_index(), image=modality(1), text=modality(2))
    with pytest.raises(IndexError, match=r"teacher, which has 100 rows: 20 of 120 are outside"):
        EpisodicClusterer(K).build(bank, {"short": TeacherAdapter.from_tensor(modality(3)[:100])})


def test_a_teacher_that_gives_another_number_of_rows_is_named():
    class Halving:
        def __getitem__(self, index):
            return torch.ones(len(index) // 2, 4)

    bank = filled_bank(random_index(), image=modality(1), text=modality(2))
    with pytest.raises(ValueError, match=r"teacher 'half' must give 120 rows for as many indices, got 60"):
        EpisodicClusterer(K).build(bank, {"half": Halving()})


def test_a_teacher_named_like_a_modality_is_an_error():
    bank = filled_bank(random_index(), image=modality(1), text=modality(2))
    with pytest.raises(ValueError, match="named like a modality of the bank, got 'text'"):
        EpisodicClusterer(K).build(bank, {"text": TeacherAdapter.from_tensor(modality(3))})


def test_more_prototypes_than_samples_is_an_error():
    bank = filled_bank(torch.tensor([0, 1, 2, 1, 2]), image=modality(1), text=modality(2))
    with pytest.raises(ValueError, match="num_prototypes=4, got 3"):
        EpisodicClusterer(4).build(bank)


def test_rows_that_are_not_finite_leave_their_own_modality_only():
    image, text, teacher = modality(1), modality(2), modality(3)
    image[4], image[90, 2], text[7, 0], teacher[11] = torch.nan, torch.inf, torch.nan, torch.nan
    bank = filled_bank(random_index(), image=image, text=text)
    prototypes = EpisodicClusterer(K, max_dropped=0.1).build(bank, {"t": TeacherAdapter.from_tensor(teacher)})
    assert_terms_follow(prototypes, {"image": image, "text": text}, {"image": image, "text": text, "t": teacher})
    assert (prototypes.terms["text", "image"].labels == -1).nonzero().flatten().tolist() == [4, 90]
    assert (prototypes.terms["image", "t"].labels == -1).nonzero().flatten().tolist() == [11]
    with pytest.raises(ValueError, match=r"NaN or Inf in at most max_dropped=0.01 of its rows, got 2 of 120"):
        EpisodicClusterer(K).build(bank)


def test_a_cluster_whose_members_a_student_lost_is_invalid_for_that_student():
    text, groups = blobs(clusters=4, each=30, width=WIDTH)
    image = modality(1)
    image[groups == 2] = torch.nan
    prototypes = EpisodicClusterer(4, nredo=20, max_dropped=0.5).build(filled_bank(random_index(), image=image, text=text))
    term = prototypes.terms["image", "text"]
    kept = {int(k) for k in term.labels[groups[prototypes.index] != 2]}
    assert term.valid.tolist() == [k in kept for k in range(4)]
    assert (term.labels[groups[prototypes.index] == 2] == -1).all()
    assert prototypes.report.unlabelled["text"] == 30
    assert (term.prototypes[~term.valid] == 0).all()


def test_a_float16_bank_is_back_translated_in_float32():
    image, text = modality(1), modality(2)
    bank = filled_bank(random_index(), dtype=torch.float16, image=image, text=text)
    prototypes = EpisodicClusterer(K).build(bank)
    assert_terms_follow(prototypes, *[{"image": image.half(), "text": text.half()}] * 2)
    assert {term.prototypes.dtype for term in prototypes.terms.values()} == {torch.float32}


def test_building_changes_neither_bank_nor_teacher():
    teacher = modality(3)
    bank = filled_bank(random_index(), image=modality(1), text=modality(2))
    before = {name: x.clone() for name, x in bank.features.items()}
    EpisodicClusterer(K).build(bank, [TeacherAdapter.from_tensor(teacher)])
    assert all(torch.equal(bank.features[name], x) for name, x in before.items())
    assert torch.equal(teacher, modality(3))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_audio_is_a_third_modality_of_further_terms(temperature):
    """Extraction, clustering and loss of three modalities and a teacher: nothing in the library knows the word audio."""
    features = {"image": modality(1), "text": modality(2), "audio": modality(3, width=3)}
    teacher = modality(4, width=8)
    bank = FeatureBank(random_index(), WIDTH)
    for index in random_index(seed=1).split(50):
        bank.update(index, features["image"][index], features["text"][index], audio=features["audio"][index])
    prototypes = EpisodicClusterer(K).build(bank, {"t": TeacherAdapter.from_tensor(teacher)})
    assert_terms_follow(prototypes, features, {**features, "t": teacher})
    assert len(prototypes.terms) == 9

    loss = ProtoLoss(w_proto=0.7, w_external=0.3, target_temperature=temperature)
    loss.set_prototypes(prototypes)
    index = random_index(seed=2)[:16]
    z = {name: leaf(unit(16, 6, seed)) for name, seed in (("image", 5), ("text", 6))}
    h = {name: leaf(unit(16, features[name].shape[1], seed)) for name, seed in (("image", 7), ("text", 8), ("audio", 9))}
    parts = loss(
        z["image"],
        z["text"],
        10.0,
        image_features_projected=h["image"],
        text_features_projected=h["text"],
        features={"audio": h["audio"]},
        logit_scale_proto=5.0,
        index=index,
        output_dict=True,
    )
    inputs = [*z.values(), *h.values()]
    gradients = torch.autograd.grad(sum(parts.values()), inputs)
    twin = dense.objective(
        tuple(z.values()), h, 10.0, 5.0, prototypes, index, w_proto=0.7, w_external=0.3, temperature=temperature
    )
    for name, value in twin.items():
        assert_near(parts[name], value, 1e-6)  # the constants are float32
    for got, want in zip(gradients, torch.autograd.grad(sum(twin.values()), inputs), strict=True):
        assert_near(got, want, 1e-6)
    assert gradients[-1].norm() > 0


def built():
    bank = filled_bank(random_index(), image=modality(1), text=modality(2))
    return EpisodicClusterer(K).build(bank, {"t": TeacherAdapter.from_tensor(modality(3, width=9))})


def test_saved_prototypes_give_a_new_process_the_same_loss(tmp_path):
    prototypes = built()
    torch.save(prototypes.state_dict(), tmp_path / "prototypes.pt")
    in_new_process(
        """
import sys, torch
from cases import unit
from protoclip_losses import Prototypes, ProtoLoss
prototypes = Prototypes.from_state_dict(torch.load(sys.argv[1] + "/prototypes.pt", weights_only=True))
loss = ProtoLoss()
loss.set_prototypes(prototypes)
parts = loss(unit(20, 5, 1), unit(20, 5, 2), 10.0, index=torch.arange(20) * 3, output_dict=True)
torch.save({"parts": parts, "again": prototypes.state_dict()}, sys.argv[1] + "/out.pt")
""",
        tmp_path,
    )
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    loss = ProtoLoss()
    loss.set_prototypes(prototypes)
    here = loss(unit(20, 5, 1), unit(20, 5, 2), 10.0, index=torch.arange(20) * 3, output_dict=True)
    assert all(torch.equal(out["parts"][name], value) for name, value in here.items())
    saved = prototypes.state_dict()
    assert torch.equal(out["again"]["index"], saved["index"])
    for term, again in zip(saved["terms"], out["again"]["terms"], strict=True):
        assert term.keys() == again.keys()
        assert all(torch.equal(x, again[k]) if isinstance(x, torch.Tensor) else x == again[k] for k, x in term.items())


def test_positions_find_samples_in_any_order_and_number():
    term = make_term(torch.eye(2), torch.eye(2), torch.tensor([0, 1, 1]), torch.tensor([True, True]))
    prototypes = Prototypes(torch.tensor([30, 10, 20]), {("image", "text"): term})
    assert prototypes.positions(torch.tensor([20, 30, 30, 10, 20])).tolist() == [2, 0, 0, 1, 2]
    assert prototypes.positions(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(("sample", "count"), [(9, 1), (31, 1), (15, 2), (-1, 2)])
def test_a_sample_that_is_not_in_the_episode_is_an_index_error(sample, count):
    term = make_term(torch.eye(2), torch.eye(2), torch.tensor([0, 1, 1]), torch.tensor([True, True]))
    prototypes = Prototypes(torch.tensor([30, 10, 20]), {("image", "text"): term})
    with pytest.raises(IndexError, match=rf"{count} of {count + 1} are not in it \(sample {sample}, for one\)"):
        prototypes.positions(torch.tensor([10] + [sample] * count))


def test_positions_without_value_checks_assert_on_the_device():
    term = make_term(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([True, True]))
    prototypes = Prototypes(torch.tensor([30, 10]), {("image", "text"): term})
    assert prototypes.positions(torch.tensor([10]), check_values=False).tolist() == [1]
    with pytest.raises(RuntimeError):
        prototypes.positions(torch.tensor([11, 10]), check_values=False)
    assert prototypes.positions(torch.tensor([10, 30]), check_values=False).tolist() == [1, 0]


def test_positions_take_int64_vectors_only():
    with pytest.raises(TypeError, match=r"index must be int64, got torch\.int32"):
        built().positions(torch.arange(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="index must have 1 dimension"):
        built().positions(torch.zeros(2, 2, dtype=torch.int64))


GOOD = {
    "prototypes": torch.eye(3),
    "teacher_centroids": torch.ones(3, 2),
    "labels": torch.tensor([0, -1, 2, 1]),
    "valid": torch.tensor([True, True, False]),
}
NAN_IN_ROW = torch.eye(3).index_fill(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prototypes": [1.0]}, TypeError, "prototypes must be a torch.Tensor"),
        ({"prototypes": torch.ones(3)}, ValueError, "prototypes must have 2 dimensions"),
        (
            {"teacher_centroids": torch.ones(2, 2), "labels": torch.tensor([0, 1])},
            ValueError,
            "teacher_centroids must have 3 rows as prototypes",
        ),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be int64"),
        ({"labels": torch.tensor([0, 3])}, ValueError, r"labels must lie in \[0, 3\) or be -1, got 3 at position 1"),
        ({"labels": torch.tensor([-2, 0])}, ValueError, r"labels must lie in \[0, 3\) or be -1, got -2 at position 0"),
        ({"valid": torch.ones(3)}, TypeError, "valid must be a bool tensor"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, ValueError, r"valid must have shape \(3,\)"),
        ({"valid": torch.zeros(3, dtype=torch.bool)}, ValueError, "valid must leave at least one prototype"),
        ({"prototypes": NAN_IN_ROW}, ValueError, "prototypes must be finite"),
        ({"teacher_centroids": NAN_IN_ROW}, ValueError, "teacher_centroids must be finite"),
    ],
)
def test_a_bad_term_is_named(change, error, message):
    with pytest.raises(error, match=message):
        make_term(**{**GOOD, **change})


def test_one_prototype_is_enough():
    term = make_term(torch.ones(1, 2), torch.ones(1, 3), torch.tensor([-1, 0]), torch.tensor([True]))
    assert term.labels.tolist() == [-1, 0]


def test_a_term_is_a_constant():
    with pytest.raises(FrozenInstanceError):
        make_term(**GOOD).labels = torch.zeros(4)


def test_the_row_of_an_invalid_prototype_may_hold_anything():
    hole = torch.tensor([True, False, True])
    assert not make_term(NAN_IN_ROW, NAN_IN_ROW, GOOD["labels"], hole).valid[1]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([5, 1, 5, 1]), ValueError, r"each sample once, got 2 repeats \(sample 1, for one\)"),
        (torch.tensor([5, 1, 2]), ValueError, r"labels of \(image, text\) must have 3 entries as index, got 4"),
        (torch.arange(4.0), TypeError, "index must be int64"),
    ],
)
def test_bad_prototypes_are_named(index, error, message):
    with pytest.raises(error, match=message):
        Prototypes(index, {("image", "text"): make_term(**GOOD)})


def test_prototypes_of_no_sample_are_an_error():
    with pytest.raises(ValueError, match="index must hold at least one sample"):
        Prototypes(torch.tensor([], dtype=torch.int64), {})


def test_loading_replaces_everything():
    prototypes = Prototypes(torch.arange(4), {("image", "text"): make_term(**GOOD)})
    other = built()
    prototypes.load_state_dict(other.state_dict())
    assert prototypes.terms.keys() == other.terms.keys()
    assert torch.equal(prototypes.positions(torch.arange(SAMPLES)), other.positions(torch.arange(SAMPLES)))


def test_the_order_of_the_bank_does_not_change_the_clustering():
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    features = [unit(40, 4, seed) for seed in (1, 2)]
    built = []
    for rows in (torch.arange(40), order):
        bank = FeatureBank(rows, 4)
        bank.update(rows, *(x[rows] for x in features))
        built.append(EpisodicClusterer(6).build(bank))
    for pair, term in built[0].terms.items():
        assert torch.equal(term.labels, built[1].terms[pair].labels)
        assert torch.equal(term.teacher_centroids, built[1].terms[pair].teacher_centroids)
