"""The prototype term against the dense form: -sum y log p over a B x K softmax."""

import dense
import pytest
import torch
from cases import assert_near, assert_same, leaf, set_sizes, term, unit, value_and_gradients

from protoclip_losses.functional import prototype_cross_entropy, soft_targets
from protoclip_losses.kernels import prototype_cross_entropy as kernel

pytestmark = pytest.mark.usefixtures("form")

NAN = float("nan")


def ours(t, temperature=None, **kwargs):
    """The library's term as a function of features and scale."""
    M = None if temperature is None else soft_targets(t.C, t.P, temperature, valid=kwargs.get("valid"))
    return lambda h, s: prototype_cross_entropy(h, t.P, t.a, s, targets=M, **kwargs)


def twin(t, temperature=None, **kwargs):
    return lambda h, s: dense.prototype_cross_entropy(h, t.P, t.a, s, C=t.C, temperature=temperature, **kwargs)


SIZES = [(13, 7, 5), (1, 7, 5), (13, 1, 5), (13, 7, 1), (1, 1, 1), (5, 40, 3)]


@pytest.mark.parametrize(("batch", "prototypes", "width"), SIZES)
@pytest.mark.parametrize("temperature", [None, 0.3, 0.01])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_value_and_gradients_equal_the_dense_form(batch, prototypes, width, temperature, chunk_size):
    t = term(batch, prototypes, width)
    assert_same(ours(t, temperature, chunk_size=chunk_size), twin(t, temperature), t.h, t.s)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_an_empty_cluster_takes_no_mass(temperature, chunk_size):
    t = term(empty=(0, 3))
    t.P[[0, 3]], t.C[[0, 3]] = 0, 0  # as back translation leaves it: with logit 0, a phantom class
    phantom = prototype_cross_entropy(t.h, t.P, t.a, t.s)
    assert_same(ours(t, temperature, valid=t.valid, chunk_size=chunk_size), twin(t, temperature, valid=t.valid), t.h, t.s)
    assert prototype_cross_entropy(t.h, t.P, t.a, t.s, valid=t.valid) < phantom


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_an_empty_cluster_is_as_if_it_were_not_there(temperature):
    t = term(empty=(0, 3))
    there = t.valid.nonzero()[:, 0]
    M = None if temperature is None else soft_targets(t.C[there], t.P[there], temperature)
    without = prototype_cross_entropy(t.h, t.P[there], torch.searchsorted(there, t.a), t.s, targets=M)
    assert_near(ours(t, temperature, valid=t.valid)(t.h, t.s), without)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_nan_in_the_row_of_an_empty_cluster_does_not_leak(temperature):
    t = term(empty=(0, 3))
    t.P[[0, 3]], t.C[[0, 3]] = NAN, NAN
    assert_same(ours(t, temperature, valid=t.valid), twin(t, temperature, valid=t.valid), t.h, t.s)


def test_a_soft_label_may_name_an_empty_cluster_where_its_target_row_exists():
    t = term(empty=(0, 3))
    t.a[:4] = torch.tensor([0, 3, 3, 0])
    assert_same(ours(t, 0.3, valid=t.valid), twin(t, 0.3, valid=t.valid), t.h, t.s)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("ignore_index", [-1, -100, 2])
def test_an_ignored_label_leaves_sum_and_count(temperature, ignore_index):
    t = term()
    t.a[t.a == 2] = 1
    t.a[[0, 4, 12]] = ignore_index
    assert_same(ours(t, temperature, ignore_index=ignore_index), twin(t, temperature, ignore_index=ignore_index), t.h, t.s)
    kept = t.a != ignore_index
    M = None if temperature is None else soft_targets(t.C, t.P, temperature)
    alone = prototype_cross_entropy(t.h[kept], t.P, t.a[kept], t.s, targets=M)
    assert_near(ours(t, temperature, ignore_index=ignore_index)(t.h, t.s), alone)


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_nan_in_an_ignored_row_leaks_into_neither_value_nor_gradient(temperature, value):
    t = term()
    t.a[4] = -1
    broken = t.h.index_fill(0, torch.tensor([4]), value)
    want, (h_gradient, s_gradient) = value_and_gradients(ours(t, temperature), t.h, t.s)
    got, (broken_h_gradient, broken_s_gradient) = value_and_gradients(ours(t, temperature), broken, t.s)
    assert got == want
    assert torch.equal(broken_h_gradient, h_gradient)
    assert torch.equal(broken_s_gradient, s_gradient)
    assert (broken_h_gradient[4] == 0).all()


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_with_every_row_ignored_loss_and_gradients_are_zero(temperature):
    t = term()
    t.a[:] = -1
    value, gradients = value_and_gradients(ours(t, temperature), t.h, t.s)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_an_empty_batch_has_loss_zero():
    t = term()
    value, (h_gradient, s_gradient) = value_and_gradients(
        lambda h, s: prototype_cross_entropy(h, t.P, t.a[:0], s, targets=t.P), t.h[:0], t.s
    )
    assert value == 0
    assert h_gradient.shape == (0, 5)
    assert s_gradient == 0


@pytest.mark.parametrize("empty", [(), (0, 3)])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_learned_prototypes_get_exact_gradients(chunk_size, empty):
    t = term(empty=empty)
    t.a[5] = -1
    assert_same(
        lambda h, P, s: prototype_cross_entropy(h, P, t.a, s, valid=t.valid, chunk_size=chunk_size),
        lambda h, P, s: dense.prototype_cross_entropy(h, P, t.a, s, valid=t.valid),
        *(t.h, t.P, t.s),
    )


@pytest.mark.parametrize("empty", [(), (0, 3)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_learned_targets_get_exact_gradients(chunk_size, empty):
    t = term(empty=empty)
    t.a[5] = -1
    assert_same(
        lambda h, P, s, M: prototype_cross_entropy(h, P, t.a, s, targets=M, valid=t.valid, chunk_size=chunk_size),
        lambda h, P, s, M: dense.factored_cross_entropy(h, P, t.a, s, M, valid=t.valid),
        *(t.h, t.P, t.s, unit(7, 5, 9)),
    )


@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(soft):
    t = term(batch=5, prototypes=4, width=3, empty=(2,))
    inputs = [leaf(t.h), leaf(t.P), leaf(t.s)] + ([leaf(unit(4, 3, 9))] if soft else [])
    assert torch.autograd.gradcheck(
        lambda h, P, s, M=None: prototype_cross_entropy(h, P, t.a, s, targets=M, valid=t.valid, chunk_size=2), inputs
    )


@pytest.mark.parametrize("asking", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 1, 0)])
def test_only_those_who_ask_get_a_gradient(asking):
    t = term()
    given = (t.h, t.P, t.s, unit(7, 5, 9))
    inputs = [x.clone().requires_grad_(bool(ask)) for x, ask in zip(given, asking, strict=True)]
    prototype_cross_entropy(inputs[0], inputs[1], t.a, inputs[2], targets=inputs[3]).backward()
    _, want = value_and_gradients(lambda h, P, s, M: dense.factored_cross_entropy(h, P, t.a, s, M), *given)
    for x, ask, gradient in zip(inputs, asking, want, strict=True):
        if ask:
            assert_near(x.grad, gradient)
        else:
            assert x.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_without_gradients_the_value_is_the_same(mode, temperature):
    t = term()
    with mode():
        value = ours(t, temperature)(leaf(t.h), leaf(t.s))
    assert not value.requires_grad
    assert_near(value, ours(t, temperature)(leaf(t.h), leaf(t.s)))


@pytest.mark.parametrize("scale", [10, 10.0, torch.tensor(10.0), torch.tensor([10.0]), torch.tensor(10.0, dtype=torch.float16)])
def test_every_form_of_scale_is_the_same_scale(scale):
    t = term()
    assert prototype_cross_entropy(t.h, t.P, t.a, scale) == prototype_cross_entropy(t.h, t.P, t.a, t.s)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_gradient_has_the_scales_shape_and_dtype(shape):
    t = term()
    scale = torch.nn.Parameter(torch.full(shape, 10.0))
    ours(t, 0.3)(t.h, scale).backward()
    assert scale.grad.shape == shape
    assert scale.grad.dtype == torch.float32
    assert_near(scale.grad.reshape(()), value_and_gradients(twin(t, 0.3), t.h, t.s)[1][1])


def test_incoming_gradient_is_multiplied_in():
    t = term()
    once = value_and_gradients(lambda h, P, s: prototype_cross_entropy(h, P, t.a, s), t.h, t.P, t.s)[1]
    thrice = value_and_gradients(lambda h, P, s: 3 * prototype_cross_entropy(h, P, t.a, s), t.h, t.P, t.s)[1]
    for a, b in zip(once, thrice, strict=True):
        assert_near(b, 3 * a)


def test_strides_do_not_matter():
    t = term()
    h, P, M = (torch.stack([x, x], 2)[..., 0] for x in (t.h, t.P, unit(7, 5, 9)))
    a = torch.stack([t.a, t.a], 1)[:, 0]
    valid = torch.stack([t.valid, t.valid], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (h, P, M, a, valid))
    want = dense.factored_cross_entropy(t.h, t.P, t.a, t.s, M)
    assert_near(prototype_cross_entropy(h, P, a, 10.0, targets=M, valid=valid), want)
    assert_same(
        lambda h, P: prototype_cross_entropy(h.T, P.T, t.a, 10.0),
        lambda h, P: dense.prototype_cross_entropy(h.T, P.T, t.a, 10.0),
        *(t.h.T.contiguous(), t.P.T.contiguous()),
    )


def test_prototypes_of_another_dtype_are_cast_to_the_features():
    t = term()
    t.P = t.P.float().double()
    M = unit(7, 5, 9, torch.float32)
    value = prototype_cross_entropy(t.h, t.P.float(), t.a, 10.0, targets=M)
    assert value.dtype == torch.float64
    assert_near(value, dense.factored_cross_entropy(t.h, t.P, t.a, 10.0, M))
    assert prototype_cross_entropy(t.h.float(), t.P, t.a, 10.0, targets=M.double()).dtype == torch.float32


def test_gradient_of_prototypes_has_their_dtype():
    t = term()
    P = leaf(t.P.float())
    prototype_cross_entropy(t.h, P, t.a, 10.0).backward()
    assert P.grad.dtype == torch.float32


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("wrt", ["features", "prototypes", "scale"])
def test_differentiating_twice_is_refused(soft, wrt):
    t = term()
    x = {"features": leaf(t.h), "prototypes": leaf(t.P), "scale": leaf(t.s)}
    targets = unit(7, 5, 9) if soft else None
    loss = prototype_cross_entropy(x["features"], x["prototypes"], t.a, x["scale"], targets=targets, chunk_size=20)
    (gradient,) = torch.autograd.grad(loss, x[wrt], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="twice"):
        (loss + gradient.square().sum()).backward()  # a gradient penalty, which would be dropped in silence


def test_inputs_are_left_as_they_were():
    t = term(empty=(3,))
    M = unit(7, 5, 9)
    before = [x.clone() for x in (t.h, t.P, t.a, t.valid, M)]
    prototype_cross_entropy(leaf(t.h), t.P, t.a, leaf(t.s), targets=M, valid=t.valid).backward()
    assert all(torch.equal(x, y) for x, y in zip(before, (t.h, t.P, t.a, t.valid, M), strict=True))


def test_bfloat16_keeps_what_a_probability_lacks_of_one():
    """Logits s, 0, 0, 0 are exact in bfloat16; p = 1 - 3 exp(-s) rounds to 1, of which neither loss nor gradient may come."""
    P, a, s = torch.eye(4), torch.arange(4), 16.0
    want, gradients = value_and_gradients(
        lambda h, s: dense.prototype_cross_entropy(h, P.double(), a, s), P.double(), torch.tensor(s)
    )
    got, ours = value_and_gradients(lambda h, s: prototype_cross_entropy(h, P.bfloat16(), a, s), P.bfloat16(), torch.tensor(s))
    for mine, truth in zip((got, *ours), (want, *gradients), strict=True):
        assert_near(mine, truth, 1e-2)


def test_bfloat16_rows_that_are_sure_and_unsure_lie_in_one_block():
    P, a, s = torch.eye(4), torch.arange(4), torch.tensor(16.0)
    h = torch.cat([P, 0.25 * P, -P])
    labels = a.repeat(3)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        apart = prototype_cross_entropy(h[rows].bfloat16(), P.bfloat16(), labels[rows], s)
        want = dense.prototype_cross_entropy(h[rows].double(), P.double(), labels[rows], s)
        assert_near(apart, want, 1e-2)
    together, (gradient,) = value_and_gradients(lambda h: prototype_cross_entropy(h, P.bfloat16(), labels, s), h.bfloat16())
    want, (truth,) = value_and_gradients(lambda h: dense.prototype_cross_entropy(h, P.double(), labels, s), h.double())
    assert_near(together, want, 1e-2)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        assert_near(gradient[rows], truth[rows], 1e-2)


def test_small_logits_go_through_the_dense_expression_unless_rows_are_asked_for(monkeypatch):
    t, seen, original = term(), [], kernel.label_nll
    monkeypatch.setattr(kernel, "label_nll", lambda *inputs: seen.append(inputs) or original(*inputs))

    def streamed(**kwargs):
        seen.clear()
        prototype_cross_entropy(t.h, t.P, t.a, t.s, **kwargs)
        return bool(seen)

    size = len(t.h) * len(t.P)
    set_sizes(monkeypatch, dense_logits=size)
    assert not streamed()
    assert streamed(chunk_size=5)
    set_sizes(monkeypatch, dense_logits=size - 1)
    assert streamed()


def test_small_logits_can_be_differentiated_twice(monkeypatch):
    set_sizes(monkeypatch, dense_logits=2**62)
    t = term()
    M = unit(7, 5, 9)
    assert torch.autograd.gradgradcheck(
        lambda h, s: prototype_cross_entropy(h, t.P, t.a, s, targets=M), (leaf(t.h), leaf(t.s)), atol=1e-5
    )
