"""``reduction`` of the losses: rows against the dense form, weighted in any way, and their memory."""

import dense
import pytest
import torch
from cases import assert_near, leaf, set_sizes, term, unit

from protoclip_losses.functional import info_nce, prototype_cross_entropy, soft_targets


def pair_rows(z_image, z_text, s):
    """1/2 (loss of image i + loss of text i)"""
    logits = s * z_image.double() @ z_text.double().T
    return -(logits.log_softmax(1).diagonal() + logits.T.log_softmax(1).diagonal()) / 2


def term_rows(h, P, a, s, M, valid=None):
    """logsumexp_j(s h_i.P_j) - s h_i.M[a_i], 0 for ignored rows"""
    safe = a.clamp(min=0)
    logits = s * h.double() @ P.double().T
    logits = logits if valid is None else logits.masked_fill(~valid, -torch.inf)
    return (logits.logsumexp(1) - s * (h.double() * M.double()[safe]).sum(1)).where(a >= 0, 0)


def assert_rows(ours, twin, *inputs):
    """Values and, under an arbitrary weight of each row, the gradients of all inputs."""
    got_leaves, want_leaves = [leaf(x) for x in inputs], [leaf(x.double()) for x in inputs]
    got, want = ours(*got_leaves), twin(*want_leaves)
    assert_near(got, want)
    weights = torch.linspace(-1, 2, len(got), dtype=torch.float64)
    (got * weights.to(got.dtype)).sum().backward()
    (want * weights).sum().backward()
    for x, y in zip(got_leaves, want_leaves, strict=True):
        assert x.grad.dtype == x.dtype
        assert_near(x.grad, y.grad)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_info_nce(chunk_size, dtype):
    inputs = unit(9, 5, 0, dtype), unit(9, 5, 1, dtype), torch.tensor(7.0, dtype=dtype)
    assert_rows(lambda *x: info_nce(*x, reduction="none", chunk_size=chunk_size), pair_rows, *inputs)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("empty", [(), (0, 3)])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("learned", [False, True])
def test_rows_of_the_prototype_term(temperature, empty, chunk_size, learned):
    t = term(empty=empty)
    t.a[2] = -1
    valid = t.valid if empty else None
    M = t.P if temperature is None else soft_targets(t.C, t.P, temperature, valid=valid)

    def ours(h, s, P=t.P):
        targets = None if temperature is None else M
        kwargs = {"targets": targets, "valid": valid, "chunk_size": chunk_size}
        return prototype_cross_entropy(h, P, t.a, s, reduction="none", **kwargs)

    def twin(h, s, P=t.P):
        return term_rows(h, P, t.a, s, P if temperature is None else M, valid)

    assert_rows(ours, twin, t.h, t.s, *([t.P] if learned else []))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_low_precision_are_as_near_as_the_naive_expression(dtype):
    t = term(batch=50, prototypes=20, scale=30.0).to(dtype)
    rows = prototype_cross_entropy(t.h, t.P, t.a, t.s, reduction="none")
    naive = torch.nn.functional.cross_entropy((t.s * t.h @ t.P.T).float(), t.a, reduction="none")
    truth = term_rows(t.h, t.P, t.a, t.s, t.P)
    assert rows.dtype == torch.float32
    assert (rows - truth).norm() <= (naive - truth).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_are_of_the_same_rows(reduction):
    t = term()
    t.a[[0, 5]] = -1
    rows = term_rows(t.h, t.P, t.a, t.s, t.P)
    wanted = {"mean": rows.sum() / 11, "sum": rows.sum(), "none": rows}[reduction]
    assert_near(prototype_cross_entropy(t.h, t.P, t.a, t.s, reduction=reduction), wanted)
    pairs = pair_rows(unit(6, 4, 0), unit(6, 4, 1), 9.0)
    wanted = {"mean": pairs.mean(), "sum": pairs.sum(), "none": pairs}[reduction]
    assert_near(info_nce(unit(6, 4, 0), unit(6, 4, 1), 9.0, reduction=reduction), wanted)
    assert_near(dense.info_nce(unit(6, 4, 0), unit(6, 4, 1), 9.0), pairs.mean())


def test_with_every_row_ignored():
    t = term()
    t.a[:] = -1
    h = leaf(t.h)
    prototype_cross_entropy(h, t.P, t.a, t.s, reduction="none").sum().backward()
    assert (h.grad == 0).all()
    assert prototype_cross_entropy(t.h, t.P, t.a, t.s, reduction="sum") == 0


def test_an_unknown_reduction_is_an_error():
    t = term()
    for call in (
        lambda: info_nce(t.h, t.h, 1.0, reduction="max"),
        lambda: prototype_cross_entropy(t.h, t.P, t.a, t.s, reduction="max"),
    ):
        with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
            call()


def test_rows_that_are_not_finite_are_named():
    t = term()
    t.h[4] = torch.nan
    with pytest.raises(ValueError, match=r"features must be finite.*first at 4"):
        prototype_cross_entropy(t.h, t.P, t.a, t.s, reduction="none")


@pytest.mark.parametrize("loss", ["info_nce", "prototype_cross_entropy"])
def test_rows_keep_no_logits_for_backward(loss, monkeypatch):
    """What autograd saves is linear in the batch: no block of logits."""
    set_sizes(monkeypatch, dense_logits=0)
    t = term(batch=64, prototypes=64)
    h = leaf(t.h)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        if loss == "info_nce":
            value = info_nce(h, leaf(t.h), 3.0, reduction="none", chunk_size=16)
        else:
            value = prototype_cross_entropy(h, t.P, t.a, 3.0, reduction="none", chunk_size=16)
    assert max(saved, default=0) < 16 * 64
    value.sum().backward()
    assert h.grad is not None
