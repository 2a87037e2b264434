"""FeatureCollector: the bank of an episode whose samples are known only as they come."""

import warnings
from pathlib import Path

import pytest
import torch
from cases import unit
from helpers import in_new_process

from protoclip_losses import EpisodicClusterer, FeatureBank, FeatureCollector, TeacherAdapter

INDEX = torch.tensor([2**34 + 1, 3, 2**33, 7, 2**32, 9, 11, 2**35, 1, 0])
IMAGE, TEXT, AUDIO, TEACHER = (unit(10, width, seed, torch.float32) for seed, width in enumerate((4, 4, 3, 6)))


def collect(collector, rows):
    collector.update(INDEX[rows], IMAGE[rows], TEXT[rows], audio=AUDIO[rows], teacher_features={"t": TEACHER[rows]})


@pytest.fixture
def collector():
    collector = FeatureCollector(dim=4)
    for rows in ([5, 0], [1], [2, 3, 4], [9, 8, 7, 6]):
        collect(collector, torch.tensor(rows))
    return collector


def test_it_makes_the_bank_that_would_have_been_filled(collector):
    assert len(collector) == 10
    bank = collector.bank()
    whole = FeatureBank(collector.index, 4)
    whole.update(INDEX, IMAGE, TEXT, audio=AUDIO)
    assert torch.equal(bank.index, INDEX[[5, 0, 1, 2, 3, 4, 9, 8, 7, 6]])
    assert bank.modalities == whole.modalities == ("image", "text", "audio")
    assert all(torch.equal(bank.features[name], x) for name, x in whole.features.items())
    bank.require_complete()


def test_its_prototypes_are_those_of_the_bank(collector):
    built = EpisodicClusterer(3).build(collector.bank(), collector.teachers())
    bank = FeatureBank(INDEX, 4)
    bank.update(INDEX, IMAGE, TEXT, audio=AUDIO)
    wanted = EpisodicClusterer(3).build(bank, {"t": TeacherAdapter.from_tensor(TEACHER, index=INDEX)})
    assert built.terms.keys() == wanted.terms.keys()
    assert ("image", "t") in built.terms
    assert ("t", "image") not in built.terms  # a teacher is no student
    for key, term in wanted.terms.items():
        assert torch.allclose(built.terms[key].prototypes, term.prototypes, atol=1e-6)
        assert torch.equal(built.terms[key].labels, term.labels)


def test_teachers_answer_by_sample(collector):
    teacher = collector.teachers()["t"]
    assert torch.equal(teacher[INDEX.flip(0)], TEACHER.flip(0))


def test_more_can_be_collected_after_a_look():
    collector = FeatureCollector(dim=4)
    assert len(collector.bank().index) == len(collector.index) == len(collector) == 0
    collect(collector, torch.arange(4))
    first = collector.bank()
    collect(collector, torch.arange(4, 10))
    assert torch.equal(collector.bank().index, INDEX)
    assert torch.equal(collector.bank().features["audio"], AUDIO)
    assert len(first.index) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_are_stored_in_the_type_asked_for(dtype):
    collector = FeatureCollector(dim=4, dtype=dtype)
    collect(collector, torch.arange(10))
    assert torch.equal(collector.bank().features["text"], TEXT.to(dtype))
    assert collector.state_dict()["features"]["t"].dtype == dtype


def test_the_bank_lies_on_the_device_asked_for():
    assert FeatureCollector(dim=4, device="meta").bank().index.device.type == "meta"


def test_nothing_collected_cannot_be_built():
    with pytest.raises(ValueError, match="bank must be complete"):
        EpisodicClusterer(3).build(FeatureCollector(dim=4).bank())


@pytest.mark.parametrize("done", [0, 1, 6])
def test_a_saved_collector_goes_on_in_a_new_process(tmp_path, done):
    collector = FeatureCollector(dim=4)
    for row in range(done):
        collect(collector, torch.tensor([row]))
    torch.save(collector.state_dict(), tmp_path / "state.pt")
    in_new_process(
        """
import sys, torch
from protoclip_losses import FeatureCollector
from test_collector import collect
collector = FeatureCollector(dim=4)
collector.load_state_dict(torch.load(sys.argv[1] + "/state.pt", weights_only=True))
collect(collector, torch.arange(int(sys.argv[2]), 10))
torch.save(collector.state_dict(), sys.argv[1] + "/state.pt")
""",
        tmp_path,
        done,
        folders=[Path(__file__).parent],
    )
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(state["index"], INDEX)
    assert state["teachers"] == ["t"]
    for name, x in {"image": IMAGE, "text": TEXT, "audio": AUDIO, "t": TEACHER}.items():
        assert torch.equal(state["features"][name], x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_features": TEXT[:3]}, ValueError, "text_features must have 2 rows"),
        ({"image_features": AUDIO[:2]}, ValueError, "image_features must have width 4"),
        ({"index": [1, 2]}, TypeError, "index must be a torch.Tensor, got list"),
        ({"audio": TEXT[:2]}, ValueError, "update must be given .*'audio': 3.* as before, got .*'audio': 4"),
        ({"teacher_features": None}, ValueError, "update must be given .*'t': 6.* as before, got"),
        ({"teacher_features": {"t": TEXT[:2]}}, ValueError, "'t': 6.* as before, got .*'t': 4"),
        (
            {"teacher_features": {"text": TEXT[:2]}},
            ValueError,
            r"teacher_features must not be named like a modality, got \['text'\]",
        ),
        ({"teacher_features": {}, "t": TEACHER[:2]}, ValueError, r"\(teachers: \['t'\]\) as before, got .*\(\[\]\)"),
    ],
)
def test_bad_updates_are_named_and_add_nothing(collector, change, error, message):
    good = {"index": INDEX[:2], "image_features": IMAGE[:2], "text_features": TEXT[:2], "audio": AUDIO[:2]}
    good["teacher_features"] = {"t": TEACHER[:2]}
    with pytest.raises(error, match=message):
        collector.update(**{**good, **change})
    assert len(collector) == 10


def test_the_state_of_another_width_is_an_error(collector):
    with pytest.raises(ValueError, match="image_features must have width 5"):
        FeatureCollector(dim=5).load_state_dict(collector.state_dict())


def test_it_prints_what_it_is(collector):
    assert repr(FeatureCollector(dim=3)) == "FeatureCollector(0 samples, dim=3, modalities=[], teachers=[], torch.float32 on cpu)"
    assert repr(collector) == (
        "FeatureCollector(10 samples, dim=4, modalities=['image', 'text', 'audio'], teachers=['t'], torch.float32 on cpu)"
    )


def test_a_forgotten_no_grad_is_said_once():
    collector, layer = FeatureCollector(dim=4), torch.nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"features \['text'\] were computed with gradients"):
        collector.update(INDEX[:2], IMAGE[:2], layer(TEXT[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collector.update(INDEX[2:], IMAGE[2:], layer(TEXT[2:]))
    assert not collector.bank().features["text"].requires_grad


def test_the_state_of_0_6_is_read(collector):
    state = {name: collector.state_dict()[name] for name in ("index", "features", "teachers")}
    other = FeatureCollector(dim=4)
    other.load_state_dict(state)
    assert torch.equal(other.teachers()["t"][INDEX], TEACHER)
    assert other.bank().modalities == ("image", "text", "audio")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": {}, "teachers": []}, ValueError, "must hold features of the 10 rows that it calls written, got none"),
        ({"features": {"t": TEACHER}}, ValueError, r"must hold the features of .*, got \['t'\]"),
        ({"features": {"image": IMAGE, "text": TEXT[:9]}, "teachers": []}, ValueError, "text_features must have 10 rows"),
        ({"index": INDEX.tolist()}, TypeError, "index must be a torch.Tensor, got list"),
        ({"index": INDEX[:9]}, ValueError, "image_features must have 9 rows"),
        ({"teachers": ["t", "u"]}, ValueError, r"'teachers'\] must name features that are no modality's, got \['u'\]"),
        ({"teachers": ["text"]}, ValueError, r"'teachers'\] must name features that are no modality's, got \['text'\]"),
        ({"format": 2}, ValueError, "state_dict of FeatureCollector must have format 1 or earlier, got 2"),
        *[({name: None}, ValueError, f"got one without '{name}'") for name in ("index", "features", "teachers")],
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(collector, change, error, message):
    state = {name: value for name, value in {**collector.state_dict(), **change}.items() if value is not None}
    other = FeatureCollector(dim=4)
    collect(other, torch.arange(3))
    with pytest.raises(error, match=message):
        other.load_state_dict(state)
    assert torch.equal(other.index, INDEX[:3])
    assert torch.equal(other.teachers()["t"][INDEX[:3]], TEACHER[:3])
