"""Mistakes that 0.6 computed with in silence are said once, and what is right is not."""

import warnings

import pytest
import torch
from cases import episode, unit
from kinds import IMAGE, INDEX, KINDS, TEXT, K, built, train

from protoclip_losses import InfoNCE, ProtoLoss
from protoclip_losses.functional import info_nce, prototype_cross_entropy


def test_nothing_is_said_of_what_is_right(said):
    loss = built()
    train(loss, IMAGE, TEXT, INDEX, times=3)
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
    messages = [message for message in said() if "_scale" in message and "log K" not in message]  # other signs follow from it
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
