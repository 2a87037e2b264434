"""Several labels for a row: the mixture of their targets, against the dense form."""

import dense
import pytest
import torch
from cases import assert_near, assert_same, episode, integers, make_term, term, unit, value_and_gradients

from protoclip_losses import ProtoLoss, Prototypes
from protoclip_losses.functional import prototype_cross_entropy, soft_targets

pytestmark = pytest.mark.usefixtures("form")

B, K = 13, 7
LABELS = torch.stack([integers(6, B, seed) for seed in (1, 2, 3)], 1)
IGNORED = LABELS.clone()
IGNORED[0, 1], IGNORED[3], IGNORED[5, :2] = -1, -1, -1
WEIGHTS = torch.rand(B, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS[7] = 0
T = term(empty=(6,))


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("labels", [LABELS, IGNORED, torch.full_like(LABELS, -1)], ids=["all", "some", "none"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients(temperature, weights, labels, chunk_size, masked):
    valid = T.valid if masked else None
    M = None if temperature is None else soft_targets(T.C, T.P, temperature, valid=valid)
    settings = {"targets": M, "valid": valid, "chunk_size": chunk_size, "label_weights": weights}
    assert_same(
        lambda h, s: prototype_cross_entropy(h, T.P, labels, s, **settings),
        lambda h, s: dense.mixture_cross_entropy(h, T.P, labels, s, weights, M, valid),
        *(T.h, T.s),
    )


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_learned_prototypes_and_targets(soft):
    M = unit(K, 5, 9)
    inputs = (T.h, T.P, T.s, M) if soft else (T.h, T.P, T.s)
    assert_same(
        lambda h, P, s, *M: prototype_cross_entropy(h, P, IGNORED, s, label_weights=WEIGHTS, targets=M[0] if M else None),
        lambda h, P, s, *M: dense.mixture_cross_entropy(h, P, IGNORED, s, WEIGHTS, M[0] if M else None),
        *inputs,
    )


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_rows(temperature):
    M = None if temperature is None else soft_targets(T.C, T.P, temperature)
    rows = prototype_cross_entropy(T.h, T.P, IGNORED, T.s, targets=M, label_weights=WEIGHTS, reduction="none")
    assert rows[3] == rows[7] == 0
    wanted = dense.mixture_cross_entropy(T.h, T.P, IGNORED, T.s, WEIGHTS, M)
    assert_near(rows.sum() / 11, wanted)


def test_one_label_is_a_mixture_of_one():
    one = prototype_cross_entropy(T.h, T.P, T.a, T.s)
    assert_near(prototype_cross_entropy(T.h, T.P, T.a[:, None], T.s), one)
    assert_near(prototype_cross_entropy(T.h, T.P, T.a[:, None].expand(B, 4), T.s), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    h, P = T.h.to(dtype), T.P.to(dtype)
    value, (gradient,) = value_and_gradients(lambda h: prototype_cross_entropy(h, P, IGNORED, 10.0, label_weights=WEIGHTS), h)
    truth, (wanted,) = value_and_gradients(lambda h: dense.mixture_cross_entropy(h, P, IGNORED, 10.0, WEIGHTS), h.double())
    assert gradient.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_near(value, truth, tolerance)
    assert_near(gradient, wanted, tolerance)


def test_in_a_compiled_graph():
    h, P, s = T.h.float(), T.P.float(), T.s.float()
    compiled = torch.compile(
        lambda h, s: prototype_cross_entropy(h, P, IGNORED, s, label_weights=WEIGHTS), backend="aot_eager", fullgraph=True
    )
    assert_same(compiled, lambda h, s: dense.mixture_cross_entropy(h, P, IGNORED, s, WEIGHTS), h, s)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_an_episode_with_several_labels(temperature):
    """In ProtoLoss a label whose prototype is not valid is left out, and a sample with no other."""
    plain = episode(samples=B, prototypes=K, empty=(6,))
    labels = torch.stack([integers(7, B, seed) for seed in (4, 5)], 1)
    labels[2] = 6
    labels[4, 0] = -1
    terms = {key: make_term(t.prototypes, t.teacher_centroids, labels, t.valid) for key, t in plain.terms.items()}
    prototypes = Prototypes(plain.index, terms)
    loss = ProtoLoss(w_clip=0.0, target_temperature=temperature)
    loss.set_prototypes(prototypes)
    h = unit(B, 5, 1), unit(B, 5, 2)
    order = torch.arange(B).flip(0)

    def ours(image, text):
        return loss(image, text, 9.0, index=prototypes.index[order])

    def twin(image, text):
        parts = []
        for (student, _), t in terms.items():
            M = None if temperature is None else dense.soft_targets(t.teacher_centroids, t.prototypes, temperature, t.valid)
            usable = labels[order].where(t.valid[labels[order].clamp(min=0)], -1)
            x = {"image": image, "text": text}[student]
            parts.append(dense.mixture_cross_entropy(x, t.prototypes, usable, 9.0, None, M, t.valid))
        return sum(parts) / 2

    assert_same(ours, twin, *h)
    other = ProtoLoss(w_clip=0.0, target_temperature=temperature)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(*h, 9.0, index=prototypes.index), loss(*h, 9.0, index=prototypes.index))


@pytest.mark.parametrize(
    ("labels", "settings", "error", "message"),
    [
        (LABELS[:4], {}, ValueError, "labels must have 13 entries as features has rows"),
        (LABELS.float(), {}, TypeError, "labels must be int64"),
        (LABELS + 5, {}, ValueError, r"labels must lie in \[0, 7\)"),
        (LABELS[..., None], {}, ValueError, "labels must have 1 dimension"),
        (LABELS[:, :0], {}, ValueError, "labels must have 1 dimension"),
        (LABELS, {"label_weights": WEIGHTS[:, :2]}, ValueError, "label_weights must have width 3 as labels"),
        (LABELS, {"label_weights": -WEIGHTS}, ValueError, "label_weights must not be negative"),
        (LABELS, {"label_weights": WEIGHTS * torch.nan}, ValueError, "label_weights must not be negative"),
        (LABELS[:, 0], {"label_weights": WEIGHTS}, ValueError, r"label_weights need labels \(B, L\)"),
        (LABELS.where(LABELS != 1, 6), {"valid": T.valid}, ValueError, "labels must not name an invalid prototype"),
    ],
)
def test_bad_input(labels, settings, error, message):
    with pytest.raises(error, match=message):
        prototype_cross_entropy(T.h, T.P, labels, 9.0, check_values=True, **settings)
