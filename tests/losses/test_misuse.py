"""Mistakes that 0.6 computed with in silence are said once, and what is right is not."""

import warnings

import pytest
import torch
from cases import episode, unit
from helpers import seeded

from protoclip_losses import EpisodicClusterer, FeatureBank, InfoNCE, OnlinePrototypes, ProtoLoss, _checks
from protoclip_losses.functional import info_nce, prototype_cross_entropy

N, K = 240, 6
# Six kinds of samples, of which image and text features both know something, each in its own way.
KINDS = torch.arange(N) % K
IMAGE, TEXT = (
    torch.nn.functional.normalize(unit(K, 8, seed, torch.float32)[KINDS] + 0.3 * unit(N, 8, seed + 1, torch.float32), dim=1)
    for seed in (1, 3)
)
INDEX = torch.arange(N)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(_checks, "SAID", set())


def trained_on(loss, image, text, index, times=1):
    for _ in range(times):
        for rows in index.split(60):
            loss(image[rows], text[rows], 10.0, index=rows)


def built():
    loss = ProtoLoss()
    loss.set_prototypes(EpisodicClusterer(K).build(FeatureBank.from_features(INDEX, image=IMAGE, text=TEXT)))
    return loss


@pytest.fixture
def said():
    """The messages of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught]


def test_nothing_is_said_of_what_is_right(said):
    loss = built()
    trained_on(loss, IMAGE, TEXT, INDEX, times=3)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    InfoNCE()(IMAGE, TEXT, scale.exp())
    assert said() == []


@pytest.mark.parametrize(
    "call",
    [
        lambda scale: info_nce(IMAGE, TEXT, scale),
        lambda scale: InfoNCE()(IMAGE, TEXT, scale),
        lambda scale: prototype_cross_entropy(IMAGE, IMAGE[:K], KINDS, scale),
        lambda scale: built()(IMAGE, TEXT, 10.0, logit_scale_proto=scale, index=INDEX),
    ],
)
@pytest.mark.parametrize(
    "scale", [torch.nn.Parameter(torch.tensor(2.6)), torch.tensor(-0.1), 0.0], ids=["parameter", "negative", "zero"]
)
def test_the_logarithm_of_the_scale(said, call, scale):
    for _ in range(3):
        call(scale)
    messages = [message for message in said() if "at chance" not in message]  # which follows from a scale below 0
    assert len(messages) == 1
    assert "probably the logarithm of the scale: pass logit_scale" in messages[0]


@pytest.mark.parametrize("loss", [InfoNCE, lambda: built()], ids=["InfoNCE", "ProtoLoss"])
def test_features_that_are_not_normalised(said, loss):
    loss = loss()
    arguments = {"index": INDEX} if isinstance(loss, ProtoLoss) else {}
    for _ in range(3):
        loss(IMAGE, 30 * TEXT, 10.0, **arguments)
    assert len(said()) == 1
    assert "text_features have rows of length 30" in said()[0]


def test_one_modality_projected_and_the_other_not(said):
    loss = built()
    for _ in range(2):
        loss(IMAGE, TEXT, 10.0, image_features_projected=IMAGE, index=INDEX)
    assert len(said()) == 1
    assert "text_features_projected is not" in said()[0]


def test_prototypes_used_for_more_than_three_times_their_episode(said):
    loss = built()
    trained_on(loss, IMAGE, TEXT, INDEX, times=3)
    assert said() == []
    trained_on(loss, IMAGE, TEXT, INDEX, times=2)
    assert len(said()) == 1
    assert "more than 3 times the samples of their episode" in said()[0]
    loss.set_prototypes(loss.prototypes)  # counts begin again
    _checks.SAID.clear()
    trained_on(loss, IMAGE, TEXT, INDEX, times=3)
    assert len(said()) == 1


def test_evaluation_does_not_use_prototypes_up(said):
    loss = built()
    with torch.no_grad():
        trained_on(loss, IMAGE, TEXT, INDEX, times=9)
    assert said() == []


def test_online_prototypes_may_be_used_for_ever(said):
    loss = ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(K, queue_size=N, every=4, warmup=2))
    image = IMAGE.clone().requires_grad_()
    for _ in range(30):
        for rows in INDEX.split(60):
            loss(image[rows], TEXT[rows], 10.0)
    assert said() == []


@pytest.mark.parametrize("mistake", ["swapped", "other index"])
def test_prototype_accuracy_at_chance(said, mistake):
    loss, order = built(), torch.randperm(N, generator=seeded(0))
    if mistake == "swapped":
        trained_on(loss, TEXT, IMAGE, INDEX, times=3)
    else:
        trained_on(loss, IMAGE[order], TEXT[order], INDEX, times=3)
    messages = [message for message in said() if "is at chance" in message]
    assert 1 <= len(messages) <= 2
    assert "swapped, or is index that of another data set?" in messages[0]


def test_a_compiled_loss_says_nothing_and_works():
    torch._dynamo.reset()
    prototypes = episode()
    loss = ProtoLoss()
    loss.set_prototypes(prototypes)
    x = 30 * unit(11, 5, 0, torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rows of length")
        compiled(x, x, 10.0, index=prototypes.index[:11])
