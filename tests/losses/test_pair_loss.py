"""ProtoLoss with SigLIP's sigmoid loss in place of InfoNCE."""

import dense
import pytest
import torch
from cases import assert_near, episode, leaf, unit, value_and_gradients

from protoclip_losses import ProtoLoss, SigmoidPairLoss

EPISODE = episode(teachers=("roberta",))
INDEX = EPISODE.index[:11]
INPUTS = (
    *(unit(11, 5, seed) for seed in (1, 2)),
    torch.tensor(10.0, dtype=torch.float64),
    torch.tensor(-4.0, dtype=torch.float64),
)


def built(prototypes=EPISODE, **settings):
    loss = ProtoLoss(pair_loss="sigmoid", target_temperature=0.1, **settings)
    loss.set_prototypes(prototypes)
    return loss


def pair_part(w_clip):
    def twin(image, text, s, b):
        prototypes = dense.objective(
            (image, text), {"image": image, "text": text}, s, s, EPISODE, INDEX, w_clip=0.0, temperature=0.1
        )
        return w_clip * dense.sigmoid_pair_loss(image, text, s, b) + sum(prototypes.values())

    return twin


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 3}, {"w_clip": 0.25, "memory_budget": 400}], ids=str)
def test_the_objective_equals_its_dense_twin(settings):
    loss = built(**settings)
    value, gradients = value_and_gradients(lambda *x: loss(*x, index=INDEX), *INPUTS)
    truth, wanted = value_and_gradients(pair_part(settings.get("w_clip", 1.0)), *INPUTS)
    assert_near(value, truth)
    for got, want in zip(gradients, wanted, strict=True):
        assert_near(got, want)


def test_parts_and_metrics_are_those_of_the_module():
    loss, pairs = built(), SigmoidPairLoss()
    parts = loss(*INPUTS, index=INDEX, output_dict=True)
    assert set(parts) == {"contrastive_loss", "proto_loss", "proto_external_loss"}
    assert_near(parts["contrastive_loss"], pairs(*INPUTS))
    assert loss.metrics["contrastive_accuracy"] == pairs.metrics["contrastive_accuracy"]


def test_in_warm_up_it_is_the_sigmoid_loss():
    assert_near(built(None)(*INPUTS), dense.sigmoid_pair_loss(*INPUTS))


def test_without_a_weight_no_bias_is_needed_and_one_that_is_given_gets_a_zero_gradient():
    loss, bias = built(w_clip=0), leaf(INPUTS[3])
    loss(*INPUTS[:3], bias, index=INDEX).backward()
    assert bias.grad == 0
    assert_near(loss(*INPUTS[:3], index=INDEX), loss(*INPUTS, index=INDEX))


def test_it_is_among_the_settings():
    assert "pair_loss='sigmoid'" in repr(built())
    assert ProtoLoss().pair_loss == "info_nce"
    assert ProtoLoss().settings.signature != ProtoLoss(pair_loss="sigmoid").settings.signature
    loss = ProtoLoss()
    loss.set_prototypes(None)
    loss.pair_loss = "sigmoid"
    assert_near(loss(*INPUTS), dense.sigmoid_pair_loss(*INPUTS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ProtoLoss(pair_loss="siglip"), ValueError, "pair_loss must be 'info_nce' or 'sigmoid', got 'siglip'"),
        (lambda: ProtoLoss(pair_loss="sigmoid", repeats="mask"), ValueError, "repeats must be None with pair_loss='sigmoid'"),
        (
            lambda: ProtoLoss(pair_loss="sigmoid", gather_with_grad=False),
            ValueError,
            "gather_with_grad must be True",
        ),
        (lambda: built()(*INPUTS[:3], index=INDEX), ValueError, "logit_bias must be given with pair_loss='sigmoid'.* got None"),
        (lambda: built()(*INPUTS[:3], torch.nan, index=INDEX), ValueError, "logit_bias must be finite, got nan"),
        (lambda: built()(*INPUTS[:3], "0", index=INDEX), TypeError, "logit_bias must be a float or a tensor .* got str"),
    ],
    ids=range(6),
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
