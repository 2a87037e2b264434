"""InfoNCE, as function and as module, against its dense twin."""

import math

import dense
import pytest
import torch
from cases import assert_near, assert_same, leaf, unit, value_and_gradients

from protoclip_losses import InfoNCE
from protoclip_losses.functional import info_nce

pytestmark = pytest.mark.usefixtures("form")

SCALE = torch.tensor(10.0, dtype=torch.float64)


@pytest.mark.parametrize(("batch", "width"), [(1, 4), (1, 1), (2, 1), (7, 3), (33, 8)])
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
def test_value_and_gradients_equal_the_dense_form(batch, width, chunk_size):
    assert_same(
        lambda *x: info_nce(*x, chunk_size=chunk_size), dense.info_nce, unit(batch, width, 0), unit(batch, width, 1), SCALE
    )


def test_modalities_of_unequal_norm_are_not_normalised_behind_the_callers_back():
    assert_same(info_nce, dense.info_nce, 3 * unit(6, 4, 0), 0.2 * unit(6, 4, 1), SCALE)


def test_module_is_the_function():
    x = unit(6, 4, 0), unit(6, 4, 1), SCALE
    assert InfoNCE()(*x) == info_nce(*x)
    assert InfoNCE(chunk_size=2, process_group=False)(*x) == info_nce(*x, chunk_size=2)


def test_gradcheck():
    inputs = (leaf(unit(5, 3, 0)), leaf(unit(5, 3, 1)), leaf(SCALE))
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, chunk_size=2), inputs)


def test_incoming_gradient_is_multiplied_in():
    x = unit(6, 4, 0), unit(6, 4, 1), SCALE
    _, once = value_and_gradients(info_nce, *x)
    _, thrice = value_and_gradients(lambda *y: 3 * info_nce(*y), *x)
    for a, b in zip(once, thrice, strict=True):
        assert_near(b, 3 * a)


@pytest.mark.parametrize(
    "scale", [10, 10.0, torch.tensor(10.0), torch.tensor([10.0]), torch.tensor(10.0, dtype=torch.float64), torch.tensor([[10.0]])]
)
def test_every_form_of_scale_is_the_same_scale(scale):
    assert info_nce(unit(6, 4, 0), unit(6, 4, 1), scale) == info_nce(unit(6, 4, 0), unit(6, 4, 1), 10.0)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_gradient_has_the_scales_shape_and_dtype(shape):
    scale = torch.nn.Parameter(torch.full(shape, 10.0, dtype=torch.float32))
    info_nce(unit(6, 4, 0), unit(6, 4, 1), scale).backward()
    assert scale.grad.shape == shape
    assert scale.grad.dtype == torch.float32
    _, (*_, want) = value_and_gradients(dense.info_nce, unit(6, 4, 0), unit(6, 4, 1), SCALE)
    assert_near(scale.grad.reshape(()), want)


@pytest.mark.parametrize("asking", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_only_those_who_ask_get_a_gradient(asking):
    inputs = [x.clone().requires_grad_(ask) for x, ask in zip((unit(6, 4, 0), unit(6, 4, 1), SCALE), asking, strict=True)]
    info_nce(*inputs).backward()
    _, want = value_and_gradients(dense.info_nce, *inputs)
    for x, ask, gradient in zip(inputs, asking, want, strict=True):
        if ask:
            assert_near(x.grad, gradient)
        else:
            assert x.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(mode):
    x = leaf(unit(6, 4, 0)), leaf(unit(6, 4, 1)), leaf(SCALE)
    with mode():
        value = info_nce(*x)
    assert not value.requires_grad
    assert_near(value, info_nce(*x))


def test_plain_inputs_give_a_plain_result():
    assert not info_nce(unit(6, 4, 0), unit(6, 4, 1), 10.0).requires_grad


def test_strides_do_not_matter():
    z = unit(12, 8, 0)[::2, ::2], unit(4, 6, 1).T
    assert not any(x.is_contiguous() for x in z)
    assert_same(
        lambda a, b, s: info_nce(a[::2, ::2], b.T, s),
        lambda a, b, s: dense.info_nce(a[::2, ::2], b.T, s),
        *(unit(12, 8, 0), unit(4, 6, 1), SCALE),
    )
    assert_near(info_nce(*z, 10.0), dense.info_nce(*z, 10.0))


def test_one_pair_has_no_loss_and_no_gradient():
    value, gradients = value_and_gradients(info_nce, unit(1, 4, 0), unit(1, 4, 1), SCALE)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_a_batch_too_large_to_keep_its_logits_gives_the_same_answer():
    # 8200 x 8200 float64 logits are more than 512 MiB. Tiling a batch adds log(copies) to the loss and shares out the gradient.
    copies = 200
    z = unit(41, 3, 0), unit(41, 3, 1)
    value, (image, text, scale) = value_and_gradients(info_nce, z[0].repeat(copies, 1), z[1].repeat(copies, 1), SCALE)
    truth, (true_image, true_text, true_scale) = value_and_gradients(dense.info_nce, *z, SCALE)
    assert_near(value, truth + math.log(copies))
    for got, want in ((image, true_image), (text, true_text)):
        assert_near(got, (want / copies).repeat(copies, 1))
    assert_near(scale, true_scale)


def test_dtypes_of_the_two_modalities_may_differ():
    image, text = leaf(unit(6, 4, 0, torch.bfloat16)), leaf(unit(6, 4, 1, torch.float32))
    value = info_nce(image, text, 10.0)
    value.backward()
    assert value.dtype == torch.float32
    assert_near(value, dense.info_nce(image, text, 10.0))
    assert (image.grad.dtype, text.grad.dtype) == (torch.bfloat16, torch.float32)
    assert_near(text.grad, value_and_gradients(dense.info_nce, image.double(), text.double(), SCALE)[1][1])


def test_output_dict():
    z = unit(6, 4, 0), unit(6, 4, 1)
    out = InfoNCE()(*z, 10.0, output_dict=True)
    assert set(out) == {"contrastive_loss"}
    assert out["contrastive_loss"] == InfoNCE()(*z, 10.0)


def test_logit_bias_is_accepted_and_gets_an_exact_zero_gradient():
    bias = torch.nn.Parameter(torch.tensor(float("nan")))
    value = InfoNCE()(unit(6, 4, 0), unit(6, 4, 1), 10.0, logit_bias=bias)
    value.backward()
    assert bias.grad == 0
    assert value == InfoNCE()(unit(6, 4, 0), unit(6, 4, 1), 10.0)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("grad", [True, False])
def test_metric_is_the_detached_share_of_images_that_rank_their_text_first(chunk_size, grad):
    image, text = unit(30, 3, 0).requires_grad_(grad), unit(30, 3, 0) + 0.4 * unit(30, 3, 1)
    loss = InfoNCE(chunk_size=chunk_size)
    loss(image, text, SCALE)
    first = (image.detach() @ text.T).argmax(1) == torch.arange(30)
    assert 0 < first.sum() < 30
    assert set(loss.metrics) == {"contrastive_accuracy"}
    accuracy = loss.metrics["contrastive_accuracy"]
    assert accuracy.shape == ()
    assert not accuracy.requires_grad
    assert_near(accuracy, first.double().mean())


@pytest.mark.parametrize("wrt", [0, 1, 2])
def test_differentiating_twice_is_refused(wrt):
    x = leaf(unit(6, 4, 0)), leaf(unit(6, 4, 1)), leaf(SCALE)
    loss = info_nce(*x)
    (gradient,) = torch.autograd.grad(loss, x[wrt], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="twice"):
        (loss + gradient.square().sum()).backward()  # a gradient penalty, which would be dropped in silence


def test_has_no_parameters_buffers_or_state():
    loss = InfoNCE()
    loss(unit(6, 4, 0), unit(6, 4, 1), 10.0)
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    assert not loss.state_dict()
