"""The sigmoid loss, as function and as module, against its dense twin: in blocks, as on an accelerator, and densely."""

import dense
import pytest
import torch
from cases import assert_near, assert_same, leaf, unit, value_and_gradients
from cost import cost

from protoclip_losses import SigmoidPairLoss
from protoclip_losses.functional import sigmoid_pair_loss

pytestmark = pytest.mark.usefixtures("form")

SCALE, BIAS = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
PAIRS = unit(6, 4, 0), unit(6, 4, 1), SCALE, BIAS


@pytest.mark.parametrize(
    ("batch", "width", "dtype"),
    [*((b, d, torch.float64) for b, d in ((1, 4), (1, 1), (2, 1), (7, 3), (33, 8))), (33, 8, torch.float32)],
)
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
def test_value_and_gradients_equal_the_dense_form(batch, width, chunk_size, dtype):
    inputs = (unit(batch, width, 0), unit(batch, width, 1), SCALE, BIAS)
    call = lambda *x: sigmoid_pair_loss(*x, chunk_size=chunk_size)  # noqa: E731
    assert_same(call, dense.sigmoid_pair_loss, *(x.to(dtype) for x in inputs))


@pytest.mark.parametrize("memory_budget", [1, 3_000, 10**9])
def test_any_budget_gives_the_same_answer(memory_budget):
    assert_same(lambda *x: sigmoid_pair_loss(*x, memory_budget=memory_budget), dense.sigmoid_pair_loss, *PAIRS)


def test_modalities_of_unequal_norm_are_not_normalised_behind_the_callers_back():
    assert_same(sigmoid_pair_loss, dense.sigmoid_pair_loss, 3 * unit(6, 4, 0), 0.2 * unit(6, 4, 1), SCALE, BIAS)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, chunk_size):
    inputs = unit(40, 16, 0, dtype), unit(40, 16, 1, dtype), SCALE.float(), BIAS.float()
    value, gradients = value_and_gradients(lambda *x: sigmoid_pair_loss(*x, chunk_size=chunk_size), *inputs)
    truth, wanted = value_and_gradients(dense.sigmoid_pair_loss, *(x.double() for x in inputs))
    assert value.dtype == torch.float32
    assert_near(value, truth, 1e-3)
    for x, got, want in zip(inputs, gradients, wanted, strict=True):
        assert got.dtype == x.dtype
        assert_near(got, want, 1e-2)


def test_under_autocast_the_product_is_in_its_dtype_and_the_rest_in_float32():
    x = [y.float() for y in (unit(40, 16, 0), unit(40, 16, 1))]
    for reduction in ("mean", "none"):
        with torch.autocast("cpu", torch.bfloat16):
            value = sigmoid_pair_loss(*x, 10.0, -3.0, reduction=reduction)
        assert value.dtype == torch.float32
        assert torch.equal(value, sigmoid_pair_loss(*(y.bfloat16() for y in x), 10.0, -3.0, reduction=reduction))
        assert not torch.equal(value, sigmoid_pair_loss(*x, 10.0, -3.0, reduction=reduction))
        with torch.autocast("cpu", torch.bfloat16):
            exact = sigmoid_pair_loss(*(y.double() for y in x), 10.0, -3.0, reduction=reduction)
        assert_near(exact.mean(), dense.sigmoid_pair_loss(*x, 10.0, -3.0))


@pytest.mark.parametrize(("scale", "bias"), [(20.0, 0.0), (100.0, -50.0), (100.0, 0.0), (1.0, 60.0), (1.0, -60.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_saturated_pairs_keep_their_digits(scale, bias, dtype):
    """Losses from 1e-20 to 100: neither side of the sigmoid may be found as 1 less the other."""
    eye = torch.eye(8, dtype=torch.float64)
    inputs = eye + 0.01 * unit(8, 8, 1), eye, torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)
    for chunk_size in (None, 3):
        assert_same(
            lambda *x, c=chunk_size: sigmoid_pair_loss(*x, chunk_size=c), dense.sigmoid_pair_loss, *(x.to(dtype) for x in inputs)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [-2000.0, 2000.0])
def test_large_logits_do_not_overflow(dtype, bias):
    x = unit(9, 4, 0, dtype), unit(9, 4, 1, dtype)
    value, gradients = value_and_gradients(lambda a, b: sigmoid_pair_loss(a, b, 1000.0, bias), *x)
    assert_near(value, dense.sigmoid_pair_loss(*x, 1000.0, bias), 1e-2)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("chunk_size", [1, 64])
def test_the_sum_of_many_blocks_keeps_its_digits(chunk_size):
    """Equal rows, whose roundings have one direction."""
    x = unit(1, 4).repeat(3000, 1), unit(1, 4, 1).repeat(3000, 1)
    one = unit(1, 4), unit(1, 4, 1)
    scales = torch.tensor(7.7), torch.tensor(-3.3)
    value, gradients = value_and_gradients(
        lambda s, b: sigmoid_pair_loss(*(y.float() for y in x), s, b, chunk_size=chunk_size), *scales
    )

    def twin(s, b):
        u = s * (one[0].double() * one[1].double()).sum() + b
        return torch.nn.functional.softplus(-u) + 2999 * torch.nn.functional.softplus(u)

    truth, wanted = value_and_gradients(twin, *(y.double() for y in scales))
    assert_near(value, truth, 1e-6)
    assert_near(gradients[0], wanted[0], 1e-4)  # the product's own sum over 3,000 equal texts
    assert_near(gradients[1], wanted[1], 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_rows_weighted_in_any_way(chunk_size):
    weights = torch.linspace(-1, 2, 11, dtype=torch.float64)

    def rows(x, y, s, b):
        z = 2 * torch.eye(11, dtype=torch.float64) - 1
        return -(torch.nn.functional.logsigmoid(z * (s * x @ y.T + b)).sum(1) * weights).sum()

    def ours(*x):
        return (sigmoid_pair_loss(*x, reduction="none", chunk_size=chunk_size) * weights).sum()

    assert_same(ours, rows, unit(11, 5, 0), unit(11, 5, 1), SCALE, BIAS)


def test_reductions_agree():
    rows = sigmoid_pair_loss(*PAIRS, reduction="none")
    assert rows.shape == (6,)
    assert_near(sigmoid_pair_loss(*PAIRS, reduction="sum"), rows.sum())
    assert_near(sigmoid_pair_loss(*PAIRS), rows.mean())


def test_gradcheck():
    inputs = tuple(leaf(x) for x in (unit(5, 3, 0), unit(5, 3, 1), SCALE, BIAS))
    assert torch.autograd.gradcheck(lambda *x: sigmoid_pair_loss(*x, chunk_size=2), inputs)


def test_incoming_gradient_is_multiplied_in():
    _, once = value_and_gradients(sigmoid_pair_loss, *PAIRS)
    _, thrice = value_and_gradients(lambda *y: 3 * sigmoid_pair_loss(*y), *PAIRS)
    for a, b in zip(once, thrice, strict=True):
        assert_near(b, 3 * a)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradients_of_scale_and_bias_have_their_shape_and_dtype(shape):
    scale, bias = (torch.nn.Parameter(torch.full(shape, x)) for x in (10.0, -3.0))
    sigmoid_pair_loss(*PAIRS[:2], scale.exp().log(), bias, chunk_size=2).backward()
    _, (*_, of_scale, of_bias) = value_and_gradients(dense.sigmoid_pair_loss, *PAIRS)
    for got, want in ((scale.grad, of_scale), (bias.grad, of_bias)):
        assert (got.shape, got.dtype) == (shape, torch.float32)
        assert_near(got.reshape(()), want)


@pytest.mark.parametrize("asking", range(1, 16))
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_only_those_who_ask_get_a_gradient(asking, chunk_size):
    inputs = [x.clone().requires_grad_(bool(asking & 1 << i)) for i, x in enumerate(PAIRS)]
    sigmoid_pair_loss(*inputs, chunk_size=chunk_size).backward()
    _, want = value_and_gradients(dense.sigmoid_pair_loss, *inputs)
    for x, gradient in zip(inputs, want, strict=True):
        if x.requires_grad:
            assert_near(x.grad, gradient)
        else:
            assert x.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(mode):
    x = [leaf(y) for y in PAIRS]
    with mode():
        value = sigmoid_pair_loss(*x)
    assert not value.requires_grad
    assert_near(value, sigmoid_pair_loss(*x))


def test_dtypes_of_the_two_modalities_may_differ():
    image, text = leaf(unit(6, 4, 0, torch.bfloat16)), leaf(unit(6, 4, 1, torch.float32))
    value = sigmoid_pair_loss(image, text, 10.0, -3.0)
    value.backward()
    assert_near(value, dense.sigmoid_pair_loss(image, text, 10.0, -3.0))
    assert (image.grad.dtype, text.grad.dtype) == (torch.bfloat16, torch.float32)


def test_differentiating_twice_is_refused_by_the_kernel():
    x = [leaf(y) for y in PAIRS]
    gradient = torch.autograd.grad(sigmoid_pair_loss(*x, chunk_size=4), x[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="sigmoid_pair_loss cannot be differentiated twice"):
        gradient.sum().backward()


def test_the_module_is_the_function():
    for given in ({}, {"chunk_size": 2}, {"memory_budget": 500}):
        assert SigmoidPairLoss(**given)(*PAIRS) == sigmoid_pair_loss(*PAIRS, **given)
    assert SigmoidPairLoss(process_group=False)(*PAIRS) == sigmoid_pair_loss(*PAIRS)
    assert repr(SigmoidPairLoss(chunk_size=2)) == "SigmoidPairLoss(equal_batch_sizes=False, chunk_size=2, memory_budget=None)"


def test_output_dict():
    out = SigmoidPairLoss()(*PAIRS, output_dict=True)
    assert set(out) == {"contrastive_loss"}
    assert out["contrastive_loss"] == SigmoidPairLoss()(*PAIRS)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("grad", [True, False])
def test_metric_is_the_detached_share_of_images_that_rank_their_text_first(chunk_size, grad):
    image, text = unit(30, 3, 0).requires_grad_(grad), unit(30, 3, 0) + 0.4 * unit(30, 3, 1)
    loss = SigmoidPairLoss(chunk_size=chunk_size)
    loss(image, text, SCALE, BIAS)
    first = (image.detach() @ text.T).argmax(1) == torch.arange(30)
    assert 0 < first.sum() < 30
    assert set(loss.metrics) == {"contrastive_accuracy"}
    accuracy = loss.metrics["contrastive_accuracy"]
    assert accuracy.shape == ()
    assert not accuracy.requires_grad
    assert_near(accuracy, first.double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_linear_in_the_batch(form, dtype):
    """137 MiB of float32 logits. An accelerator's own budget is 1 GiB."""
    if form == "dense":
        pytest.skip("for few logits")
    x = [leaf(unit(6000, 2, seed, dtype)) for seed in (0, 1)]
    budget = 40 * 2**20 if form == "accelerator" else None
    for call in (
        lambda: sigmoid_pair_loss(*x, leaf(SCALE.float()), leaf(BIAS.float()), memory_budget=budget).backward(),
        lambda: sigmoid_pair_loss(*x, 10.0, -3.0, memory_budget=budget, reduction="none").sum().backward(),
    ):
        peak, _ = cost(call)
        assert peak <= 64 * 2**20


def test_three_products_and_one_without_gradients(form):
    if form == "dense":
        pytest.skip("autograd's")
    x = [unit(1500, 64, seed, torch.float32).requires_grad_() for seed in (0, 1)]
    _, products = cost(lambda: sigmoid_pair_loss(*x, 10.0, -3.0).backward())
    assert products <= 1.05 * 3 * 1500 * 1500 * 64
    with torch.no_grad():
        _, products = cost(lambda: sigmoid_pair_loss(*x, 10.0, -3.0))
    assert products <= 1.05 * 1500 * 1500 * 64


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"image_features": torch.ones(3)},
            ValueError,
            r"image_features must have 2 dim.* got shape \(3,\)",
        ),
        ({"text_features": torch.ones(2, 4)}, ValueError, "text_features must have 3 rows as image_features"),
        ({"text_features": torch.ones(3, 5)}, ValueError, "text_features must have width 4 as image_features"),
        ({"text_features": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "text_features must be float16"),
        ({"text_features": torch.ones(3, 4, device="meta")}, ValueError, "text_features is on meta but image_features is on cpu"),
        ({"image_features": torch.full((3, 4), torch.nan)}, ValueError, "image_features must be finite"),
        ({"text_features": torch.full((3, 4), torch.inf)}, ValueError, "text_features must be finite"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite"),
        ({"logit_bias": float("inf")}, ValueError, "logit_bias must be finite, got inf"),
        ({"logit_bias": torch.tensor(torch.nan)}, ValueError, "logit_bias must be finite, got nan"),
        ({"logit_bias": None}, TypeError, r"logit_bias must be a float or a tensor of shape \(\) or \(1,\), got NoneType"),
        ({"logit_bias": True}, TypeError, r"logit_bias must be a float or a tensor of shape \(\) or \(1,\), got bool"),
        ({"logit_bias": torch.ones(2)}, ValueError, r"logit_bias must be .* got shape \(2,\)"),
        ({"logit_bias": torch.tensor(3)}, TypeError, "logit_bias must be a floating-point tensor, got torch.int64"),
    ],
    ids=str,
)
def test_bad_input(changed, error, message):
    given = {"image_features": torch.ones(3, 4), "text_features": torch.ones(3, 4), "logit_scale": 10.0, "logit_bias": -3.0}
    for call in (sigmoid_pair_loss, SigmoidPairLoss(check_values=True)):
        settings = {"check_values": True} if call is sigmoid_pair_loss else {}
        with pytest.raises(error, match=message):
            call(**{**given, **changed}, **settings)


def test_bad_settings():
    with pytest.raises(ValueError, match="reduction must be"):
        sigmoid_pair_loss(*PAIRS, reduction="total")
    with pytest.raises(ValueError, match="image_features must have at least one row"):
        sigmoid_pair_loss(unit(0, 4), unit(0, 4), 10.0, -3.0)
    for make in (SigmoidPairLoss, lambda **given: sigmoid_pair_loss(*PAIRS, **given)):
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            make(chunk_size=0)
        with pytest.raises(ValueError, match="memory_budget must be at least 1"):
            make(memory_budget=0)
        with pytest.raises(ValueError, match="chunk_size and memory_budget must not both be given"):
            make(chunk_size=1, memory_budget=1)
    with pytest.raises(TypeError, match="process_group must be"):
        SigmoidPairLoss(process_group=True)


def test_check_values_decides_whether_values_are_read():
    broken = unit(6, 4).index_fill(0, torch.tensor([2]), torch.nan)
    assert torch.isnan(sigmoid_pair_loss(broken, unit(6, 4), 10.0, -3.0, check_values=False))
    assert torch.isnan(sigmoid_pair_loss(unit(6, 4), unit(6, 4), 10.0, torch.nan, check_values=False))
    assert torch.isnan(SigmoidPairLoss(check_values=False)(broken, unit(6, 4), 10.0, -3.0))
