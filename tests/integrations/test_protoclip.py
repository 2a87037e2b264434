"""The three names that the paper's training loop imports, against its formulas."""

import dense
import pytest
import torch
from cases import assert_near, integers, leaf, unit

from protoclip_losses.integrations.protoclip import ClipLoss, ProtoLoss, gather_features

B, K, D, WIDE = 12, 7, 5, 9


def call(loss, h, P, C, s, temperature, a):
    """As ``train.py`` calls it."""
    return loss(
        student_features=h,
        student_centroids=P,
        teacher_centroids=C,
        logit_scale_student=s,
        teacher_temperature=temperature,
        labels=a,
    )


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0, -1])
@pytest.mark.parametrize("ignored", [0, 3])
def test_values_and_gradients_are_those_of_the_formula(temperature, ignored):
    h, P, C, a = leaf(unit(B, D, 1)), 0.8 * unit(K, D, 2), 0.9 * unit(K, WIDE, 3), integers(K, B)
    a[:ignored] = -1
    s = leaf(torch.tensor(14.0, dtype=torch.float64))
    value, accuracy = call(ProtoLoss(), h, P, C, s, temperature, a)
    soft = temperature if temperature > 0 else None
    wanted = dense.prototype_cross_entropy(h, P, a, s, C=C, temperature=soft)
    assert_near(value, wanted)
    for got, want in zip(torch.autograd.grad(value, [h, s]), torch.autograd.grad(wanted, [h, s]), strict=True):
        assert_near(got, want)
    assert type(accuracy) is float
    assert accuracy == pytest.approx(100 * ((h @ P.T).argmax(1) == a).sum().item() / B)


def test_the_four_calls_of_a_step_keep_their_targets_and_see_new_centroids():
    """An episode's centroids are the same tensors in each step; the next episode's are others, or the same written over."""
    loss, a, h = ProtoLoss(), integers(K, B), unit(B, D, 1)
    pairs = [(unit(K, D, seed), unit(K, WIDE, seed + 10)) for seed in range(20)]
    for P, C in pairs[:4] * 2 + pairs[4:] + pairs[:4]:
        value, _ = call(loss, h, P, C, 10.0, 0.1, a)
        assert_near(value, dense.prototype_cross_entropy(h, P, a, 10.0, C=C, temperature=0.1))
    assert len(loss._soft) <= 8
    P, C = pairs[0]
    for x in (P, C):
        x.copy_(x.flip(0) * 0.5)
        value, _ = call(loss, h, P, C, 10.0, 0.1, a)
        assert_near(value, dense.prototype_cross_entropy(h, P, a, 10.0, C=C, temperature=0.1))


def test_clip_loss_takes_the_arguments_of_the_loop():
    z, x = unit(B, D, 1), unit(B, D, 2)
    loss = ClipLoss(local_loss=True, gather_with_grad=False, cache_labels=True, rank=0, world_size=1, use_horovod=False)
    assert_near(loss(z, x, 10.0), dense.info_nce(z, x, 10.0))
    assert gather_features(z, x, True, False, 0, 1, False) == (z, x)


@pytest.mark.parametrize("wrong", ["features", "centroids", "labels", "temperature"])
def test_errors_name_the_keyword(wrong):
    h, P, C, a, temperature = unit(B, D, 1), unit(K, D, 2), unit(K, WIDE, 3), integers(K, B), 0.1
    if wrong == "features":
        h, message = unit(B, D + 1), "student_centroids must have width 6 as student_features"
    elif wrong == "centroids":
        C, message = C[1:], "teacher_centroids must have 7 rows as student_centroids"
    elif wrong == "labels":
        a, message = a + K, r"labels must lie in \[0, 7\)"
    else:
        temperature, message = float("nan"), "teacher_temperature must be positive and finite"
    with pytest.raises(ValueError, match=message):
        call(ProtoLoss(), h, P, C, 10.0, temperature, a)


@pytest.mark.parametrize("temperature", [-1, 0.1])
def test_a_loss_that_is_not_finite_names_its_input(temperature):
    features, centroids = torch.eye(3), torch.eye(3)
    features[1, 0] = float("nan")
    with pytest.raises(ValueError, match="student_features must be finite, got NaN or Inf: 1 of 3 rows, the first at 1"):
        ProtoLoss()(
            student_features=features,
            student_centroids=centroids,
            teacher_centroids=centroids,
            logit_scale_student=1.0,
            teacher_temperature=temperature,
            labels=torch.tensor([0, 1, 2]),
        )
