"""PrototypeLoss on raw centroids: the dense value, and targets that are kept without ever being stale."""

import copy
import pickle

import dense
import pytest
import torch
from cases import assert_near, assert_same, leaf, term, unit, value_and_gradients
from torch.profiler import ProfilerActivity, profile

from protoclip_losses import PrototypeLoss
from protoclip_losses.functional import prototype_cross_entropy

pytestmark = pytest.mark.usefixtures("form")


def truth(t, temperature, valid=None, **kwargs):
    return dense.prototype_cross_entropy(t.h, t.P, t.a, t.s, C=t.C, temperature=temperature, valid=valid, **kwargs)


@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0, None, 0, -1])
@pytest.mark.parametrize("empty", [(), (0, 3)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_value_and_gradients_equal_the_dense_form(temperature, empty, chunk_size):
    t = term(empty=empty)
    t.a[5] = -1
    hard = temperature is None or temperature <= 0
    loss = PrototypeLoss(temperature, chunk_size=chunk_size)
    assert_same(
        lambda h, s: loss(h, t.P, t.C, t.a, s, valid=t.valid),
        lambda h, s: dense.prototype_cross_entropy(
            h, t.P, t.a, s, C=t.C, temperature=None if hard else temperature, valid=t.valid
        ),
        *(t.h, t.s),
    )


def test_default_temperature_is_the_papers():
    t = term()
    assert_near(PrototypeLoss()(t.h, t.P, t.C, t.a, t.s), truth(t, 0.01))


def test_hard_targets_are_the_function():
    t = term()
    assert PrototypeLoss(None)(t.h, t.P, t.C, t.a, t.s) == prototype_cross_entropy(t.h, t.P, t.a, t.s)


def test_ignore_index():
    t = term()
    t.a[:4] = -7
    assert_near(PrototypeLoss(0.3)(t.h, t.P, t.C, t.a, t.s, ignore_index=-7), truth(t, 0.3, ignore_index=-7))


def test_nan_in_an_ignored_row_leaks_into_neither_value_nor_gradient():
    t = term()
    t.a[4] = -1
    broken = t.h.index_fill(0, torch.tensor([4]), float("nan"))
    want, gradients = value_and_gradients(lambda h, s: PrototypeLoss(0.3)(h, t.P, t.C, t.a, s), t.h, t.s)
    got, broken_gradients = value_and_gradients(lambda h, s: PrototypeLoss(0.3)(h, t.P, t.C, t.a, s), broken, t.s)
    assert got == want
    assert all(torch.equal(a, b) for a, b in zip(gradients, broken_gradients, strict=True))


def test_with_every_row_ignored_loss_and_gradients_are_zero():
    t = term()
    t.a[:] = -1
    value, gradients = value_and_gradients(lambda h, s: PrototypeLoss(0.3)(h, t.P, t.C, t.a, s), t.h, t.s)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_what_an_empty_cluster_holds_does_not_leak():
    t = term(empty=(0, 3))
    want = PrototypeLoss(0.3)(t.h, t.P, t.C, t.a, t.s, valid=t.valid)
    t.P[0], t.C[0], t.P[3], t.C[3] = float("nan"), float("nan"), 1e9, -1e9
    assert PrototypeLoss(0.3)(t.h, t.P, t.C, t.a, t.s, valid=t.valid) == want


def test_without_gradients_the_value_is_the_same():
    t = term()
    with torch.no_grad():
        assert_near(PrototypeLoss(0.3)(t.h, t.P, t.C, t.a, t.s), truth(t, 0.3))


# --- The targets that are kept


def test_rows_are_filled_in_as_labels_ask_for_them():
    t = term(batch=40)
    loss = PrototypeLoss(0.3)
    for labels in t.a.split(3):  # 13 batches, each with old labels and new ones
        n = len(labels)
        assert_near(
            loss(t.h[:n], t.P, t.C, labels, t.s),
            dense.prototype_cross_entropy(t.h[:n], t.P, labels, t.s, C=t.C, temperature=0.3),
        )


@pytest.mark.parametrize("which", ["P", "C"])
def test_a_change_in_place_is_seen(which):
    t = term()
    loss = PrototypeLoss(0.3)
    before = loss(t.h, t.P, t.C, t.a, t.s)
    getattr(t, which).mul_(-1.3)
    assert_near(loss(t.h, t.P, t.C, t.a, t.s), truth(t, 0.3))
    assert loss(t.h, t.P, t.C, t.a, t.s) != before


@pytest.mark.parametrize("which", ["P", "C"])
def test_a_new_tensor_is_seen(which):
    t = term()
    loss = PrototypeLoss(0.3)
    old = getattr(t, which)
    for _ in range(3):
        loss(t.h, t.P, t.C, t.a, t.s)
        setattr(t, which, -1.3 * old)
        assert_near(loss(t.h, t.P, t.C, t.a, t.s), truth(t, 0.3))
        setattr(t, which, old)
        assert_near(loss(t.h, t.P, t.C, t.a, t.s), truth(t, 0.3))


def test_another_mask_is_seen():
    t = term(empty=(0, 3))
    loss = PrototypeLoss(0.3)
    other = t.valid.clone()
    other[0] = True
    for valid in (None, t.valid, other, None, other):
        assert_near(loss(t.h, t.P, t.C, t.a, t.s, valid=valid), truth(t, 0.3, valid=valid))
    t.valid[0] = True
    assert_near(loss(t.h, t.P, t.C, t.a, t.s, valid=t.valid), truth(t, 0.3, valid=t.valid))


def test_a_mask_changed_in_place_is_seen():
    t = term(empty=(0, 3))
    loss = PrototypeLoss(0.3)
    loss(t.h, t.P, t.C, t.a, t.s, valid=t.valid)
    t.valid[0] = True
    assert_near(loss(t.h, t.P, t.C, t.a, t.s, valid=t.valid), truth(t, 0.3, valid=t.valid))


def test_a_tensor_that_takes_a_dead_ones_place_is_not_mistaken_for_it():
    t = term()
    loss = PrototypeLoss(0.3)
    seen, reused = set(), 0
    for seed in range(60):
        t.C = None  # dead, and its address free
        t.C = unit(7, 4, seed)
        reused += id(t.C) in seen
        seen.add(id(t.C))
        assert_near(loss(t.h, t.P, t.C, t.a, t.s), truth(t, 0.3))
    assert reused


def test_another_temperature_is_seen():
    t = term()
    loss = PrototypeLoss(0.3)
    loss(t.h, t.P, t.C, t.a, t.s)
    loss.target_temperature = 2.0
    assert_near(loss(t.h, t.P, t.C, t.a, t.s), truth(t, 2.0))


def test_the_kept_targets_do_not_keep_the_centroids_alive():
    import weakref

    t = term()
    loss = PrototypeLoss(0.3)
    loss(t.h, t.P, t.C, t.a, t.s)
    dead = weakref.ref(t.C)
    t.C = None
    assert dead() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_first_does_not_spoil_the_training_after_it(mode):
    t = term()
    loss = PrototypeLoss(0.3)
    with mode():
        loss(t.h[:2], t.P, t.C, t.a[:2], t.s)
    assert_same(
        lambda h, s: loss(h, t.P, t.C, t.a, s),
        lambda h, s: dense.prototype_cross_entropy(h, t.P, t.a, s, C=t.C, temperature=0.3),
        *(t.h, t.s),
    )


def test_centroids_made_in_inference_mode_can_be_trained_against():
    t = term()
    loss = PrototypeLoss(0.3)
    with torch.inference_mode():
        P, C = t.P.clone(), t.C.clone()
    for _ in range(2):
        value, _ = value_and_gradients(lambda h, s: loss(h, P, C, t.a, s), t.h, t.s)
        assert_near(value, truth(t, 0.3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_used_loss_can_be_copied(copied):
    t = term()
    loss = PrototypeLoss(0.3)
    loss(t.h, t.P, t.C, t.a, t.s)
    assert_near(copied(loss)(t.h, t.P, t.C, t.a, t.s), truth(t, 0.3))


def products(call):
    """Multiply-adds of the matrix products of a call."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as p:
        call()
    return sum(event.flops for event in p.key_averages()) // 2


def test_a_call_builds_only_the_rows_it_needs_and_only_once(form):
    """An accelerator would be waited for to know which rows these are: there all are built at once."""
    t = term(batch=6, prototypes=3000, width=4, teacher_width=50, seed=3)
    t.a = torch.tensor([5, 5, 2000, 17, 5, 17])
    loss = PrototypeLoss(0.3)
    call = lambda: loss(t.h, t.P, t.C, t.a, t.s)  # noqa: E731
    rows = 3000 if form == "accelerator" else 3
    build = 3000 * rows * (50 + 4)  # three distinct labels against every teacher centroid, and on to the student's prototypes
    first, again = products(call), products(call)
    assert again < build
    assert build <= first <= 2 * build
    t.a[0] = 99
    if form != "accelerator":
        assert again < products(call) < again + build
    t.C.add_(0)
    assert products(call) >= build
    assert_near(call(), truth(t, 0.3))


def test_centroids_that_require_gradient_are_refused_where_one_would_be_lost():
    t = term()
    for P, C in ((leaf(t.P), t.C), (t.P, leaf(t.C))):
        with pytest.raises(ValueError, match=r"centroids.*detached"):
            PrototypeLoss(0.3)(t.h, P, C, t.a, t.s)
        with torch.no_grad():
            assert_near(PrototypeLoss(0.3)(t.h, P, C, t.a, t.s), truth(t, 0.3))


def test_has_no_parameters_buffers_or_state():
    t = term()
    loss = PrototypeLoss(0.3)
    loss(t.h, t.P, t.C, t.a, t.s)
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    assert not loss.state_dict()
