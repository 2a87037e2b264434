"""Soft targets M = softmax(C C^T / tau) P against the dense product."""

import dense
import pytest
import torch
from cases import assert_near, leaf, term, unit

from protoclip_losses.functional import soft_targets


@pytest.mark.parametrize(("prototypes", "width", "teacher_width"), [(7, 5, 4), (1, 3, 2), (9, 1, 1), (3000, 4, 3)])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 5, 1e6])
def test_value_equals_the_dense_form(prototypes, width, teacher_width, temperature):
    P, C = unit(prototypes, width, 1), unit(prototypes, teacher_width, 2)
    assert_near(soft_targets(C, P, temperature), dense.soft_targets(C, P, temperature))


def test_several_blocks_of_rows_give_the_same_answer():
    # 12,000 columns leave fewer than 1024 rows to a block; single rows are checked, the whole is too large for a dense form
    P, C = unit(12000, 3, 1, torch.float32), unit(12000, 2, 2, torch.float32)
    got = soft_targets(C, P, 0.1)
    rows = torch.tensor([0, 1, 173, 174, 175, 1023, 1024, 6000, 11998, 11999])
    assert (got[rows] - (C[rows].double() @ C.double().T / 0.1).softmax(1) @ P.double()).abs().max() <= 1e-5


def test_empty_clusters_take_no_mass_and_the_rest_is_renormalised():
    t = term(empty=(0, 3))
    got = soft_targets(t.C, t.P, 0.3, valid=t.valid)
    want = dense.soft_targets(t.C, t.P, 0.3, t.valid)
    assert_near(got[t.valid], want[t.valid])
    mass = soft_targets(t.C, torch.ones(7, 1, dtype=torch.float64), 0.3, valid=t.valid)
    assert_near(mass, torch.ones(7, 1))


def test_what_an_empty_cluster_holds_does_not_leak_into_the_others():
    t = term(empty=(0, 3))
    want = soft_targets(t.C, t.P, 0.3, valid=t.valid)
    t.C[0], t.P[0], t.C[3], t.P[3] = float("nan"), float("nan"), 1e9, float("inf")
    assert torch.equal(soft_targets(t.C, t.P, 0.3, valid=t.valid)[t.valid], want[t.valid])


def test_a_low_temperature_gives_hard_targets():
    t = term()
    assert_near(soft_targets(t.C, t.P, 1e-6), t.P)


@pytest.mark.parametrize(
    ("teacher", "student", "result"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_result_is_at_least_float32(teacher, student, result):
    t = term()
    C, P = t.C.to(teacher), t.P.to(student)
    got = soft_targets(C, P, 0.3)
    assert got.dtype == result
    assert_near(got, dense.soft_targets(C, P, 0.3))


def test_autocast_does_not_lower_the_precision():
    t = term().to(torch.float32)
    want = soft_targets(t.C, t.P, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_targets(t.C, t.P, 0.01), want)


def test_result_is_a_constant():
    t = term()
    assert not soft_targets(leaf(t.C), leaf(t.P), 0.3).requires_grad


def test_inputs_are_left_as_they_were():
    t = term(empty=(3,))
    before = t.C.clone(), t.P.clone(), t.valid.clone()
    soft_targets(t.C, t.P, 0.3, valid=t.valid)
    assert all(torch.equal(x, y) for x, y in zip(before, (t.C, t.P, t.valid), strict=True))
