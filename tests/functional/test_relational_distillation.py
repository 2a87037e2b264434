"""Relational distillation against its dense twin: value, gradients, rows left out, dtypes, blocks, memory."""

import dense
import pytest
import torch
from cases import assert_near, assert_same, leaf, set_sizes, unit, value_and_gradients

from protoclip_losses import RelationalDistillation
from protoclip_losses.functional import relational_distillation

TAU = 0.2


def inputs(rows=11, width=5, dtype=torch.float64, scale=9.0):
    return unit(rows, width, 1, dtype), torch.tensor(scale, dtype=dtype)


def teacher(rows=11, width=7, dtype=torch.float64, zeros=()):
    t = unit(rows, width, 2, dtype) * torch.linspace(0.1, 30, rows, dtype=dtype)[:, None]
    t[list(zeros)] = 0
    return t


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11, 100])
@pytest.mark.parametrize("zeros", [(), (0,), (3, 10), tuple(range(9)), tuple(range(1, 11)), tuple(range(11))], ids=len)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients(chunk_size, zeros, dtype):
    t = teacher(zeros=zeros, dtype=dtype)
    assert_same(
        lambda h, s: relational_distillation(h, t, s, TAU, chunk_size=chunk_size),
        lambda h, s: dense.relational_distillation(h, t, s, TAU),
        *inputs(dtype=dtype),
    )


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_rows(rows, reduction):
    t = teacher(rows)
    value, gradients = value_and_gradients(
        lambda h, s: relational_distillation(h, t, s, TAU, reduction=reduction).sum(), *inputs(rows)
    )
    assert value == pytest.approx(0, abs=1e-15)  # two rows have one neighbour each: softmax is 1 whatever it is
    assert all(torch.isfinite(g).all() and g.norm() < 1e-14 for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    t = teacher(40, dtype=dtype)
    h, s = inputs(40, 16, dtype)
    s = s.float()
    value, (gh, gs) = value_and_gradients(lambda h, s: relational_distillation(h, t, s, TAU), h, s)
    truth, (th, ts) = value_and_gradients(lambda h, s: dense.relational_distillation(h, t, s, TAU), h.double(), s.double())
    assert value.dtype == torch.float32
    assert gh.dtype == dtype
    assert_near(value, truth, 2e-2)
    assert_near(gh, th, 2e-2)
    assert_near(gs, ts, 3e-2)


def test_under_autocast_only_the_students_product_is_rounded():
    t = teacher(40, dtype=torch.float32)
    h, s = inputs(40, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, (gh, _) = value_and_gradients(lambda h, s: relational_distillation(h, t, s, TAU), h, s)
    truth, (th, _) = value_and_gradients(lambda h, s: dense.relational_distillation(h, t, s, TAU), h.double(), s.double())
    assert value.dtype == gh.dtype == torch.float32
    assert_near(value, truth, 2e-2)
    assert_near(gh, th, 2e-2)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("zeros", [(), (3, 10), tuple(range(10))], ids=len)
def test_rows_weighted_in_any_way(chunk_size, zeros):
    t = teacher(zeros=zeros)
    weights = torch.linspace(-1, 2, 11, dtype=torch.float64)

    def rows(h, s):
        known = t.any(1)
        if known.sum() < 2:
            return s * h.sum() * 0
        others = ~torch.eye(11, dtype=torch.bool) & known
        log_p, log_q = (
            x.masked_fill(~others, -torch.inf).log_softmax(1)
            for x in (torch.nn.functional.normalize(t, dim=1) @ torch.nn.functional.normalize(t, dim=1).T / TAU, s * h @ h.T)
        )
        kl = (log_p.exp() * (log_p - log_q).masked_fill(~others, 0)).sum(1)
        return (kl.where(known, 0) * weights).sum()

    assert_same(
        lambda h, s: (relational_distillation(h, t, s, TAU, reduction="none", chunk_size=chunk_size) * weights).sum(),
        rows,
        *inputs(),
    )


def test_reductions_agree():
    h, s = inputs()
    t = teacher(zeros=(2,))
    rows = relational_distillation(h, t, s, TAU, reduction="none")
    assert rows[2] == 0
    assert_near(relational_distillation(h, t, s, TAU, reduction="sum"), rows.sum())
    assert_near(relational_distillation(h, t, s, TAU), rows.sum() / 10)


def test_a_student_like_the_teacher_has_no_loss_and_no_gradient():
    h = unit(9, 5, 3)
    value, (gh, gs) = value_and_gradients(lambda h, s: relational_distillation(h, h * 3, s, 1 / 7), h, torch.tensor(7.0).double())
    assert abs(value) < 1e-15
    assert gh.norm() < 1e-13
    assert abs(gs) < 1e-14


def test_no_gradient_reaches_the_teacher():
    t = leaf(teacher())
    h, s = (leaf(x) for x in inputs())
    relational_distillation(h, t, s, TAU).backward()
    assert t.grad is None


def test_frozen_features_are_enough_to_learn_the_scale():
    h, s = inputs()
    assert_same(
        lambda s: relational_distillation(h, teacher(), s, TAU), lambda s: dense.relational_distillation(h, teacher(), s, TAU), s
    )
    assert_same(
        lambda h: relational_distillation(h, teacher(), 9.0, TAU),
        lambda h: dense.relational_distillation(h, teacher(), 9.0, TAU),
        h,
    )


def test_in_a_compiled_graph():
    h, s = inputs(dtype=torch.float32)
    t = teacher(dtype=torch.float32, zeros=(4,))
    compiled = torch.compile(lambda h, s: relational_distillation(h, t, s, TAU), fullgraph=True, backend="aot_eager")
    assert_same(compiled, lambda h, s: dense.relational_distillation(h, t, s, TAU), h, s)


def test_memory_stays_within_its_blocks(monkeypatch):
    """No tensor of B x B: counted by the largest that is made."""
    set_sizes(monkeypatch, block_bytes=2**16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    h, s = (leaf(x) for x in inputs(500, 4, torch.float32))
    for reduction in ("mean", "none"):
        with Watch():
            relational_distillation(h, teacher(500, 4, torch.float32), s, TAU, reduction=reduction).sum().backward()
    assert 0 < largest <= 2**14


def test_the_module_is_the_function():
    h, s = inputs()
    assert torch.equal(RelationalDistillation(TAU)(h, teacher(), s), relational_distillation(h, teacher(), s, TAU))
    blocks = "equal_batch_sizes=False, chunk_size=None, memory_budget=None"
    assert repr(RelationalDistillation()) == f"RelationalDistillation(temperature=0.1, {blocks})"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.ones(3)}, ValueError, "features must have 2 dimensions"),
        ({"teacher_features": torch.ones(2, 4)}, ValueError, "teacher_features must have 3 rows as features"),
        ({"teacher_features": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "teacher_features must be float16"),
        ({"teacher_features": torch.full((3, 4), torch.nan)}, ValueError, "teacher_features must be finite"),
        ({"features": torch.full((3, 4), torch.inf)}, ValueError, "features must be finite"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": None}, TypeError, "temperature must be a float"),
        ({"reduction": "total"}, ValueError, "reduction must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be"),
    ],
)
def test_bad_input(changed, error, message):
    arguments = {"features": torch.eye(3, 4), "teacher_features": torch.eye(3, 4), "logit_scale": 1.0, "temperature": 0.1}
    with pytest.raises(error, match=message):
        relational_distillation(**{**arguments, **changed})
