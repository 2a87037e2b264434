"""GradCache against one large batch: values, gradients, random numbers, buffers, and how often encoders run."""

import copy
import math
import types

import pytest
import torch
import torch.nn.functional as F
from cases import assert_near, episode, unit
from cost import cost
from torch import nn

from protoclip_losses import GradCache, InfoNCE, OnlinePrototypes, ProtoLoss, SigmoidPairLoss
from protoclip_losses.losses.replay import RandomState

B = 22
EPISODE = episode(teachers=("roberta",))
INDEX = EPISODE.index[:B]
IMAGES, TEXTS = unit(B, 7, 1), unit(B, 6, 2)


class Towers(nn.Module):
    """Two encoders with heads, all scales and a bias; ``names`` are the outputs that a loss takes."""

    def __init__(self, names, between=nn.Identity):
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(n, 9), between(), nn.Tanh(), nn.Linear(9, 6)) for n in (7, 6))
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([-3.0]))
        self.logit_scale_proto = nn.Parameter(torch.tensor(1.5))
        self.names, self.rows = names, []

    def forward(self, images, texts):
        self.rows.append(len(images))
        z = self.image(images), self.text(texts)
        out = dict(zip(("image_features", "text_features"), (F.normalize(x, dim=1) for x in z), strict=True))
        projected = (F.normalize(head(x), dim=1) for head, x in zip(self.heads, z, strict=True))
        out |= dict(zip(("image_features_projected", "text_features_projected"), projected, strict=True))
        out |= {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}
        out["logit_scale_proto"] = self.logit_scale_proto.exp()
        return {name: x for name, x in out.items() if name in self.names}


FEATURES = ("image_features", "text_features", "logit_scale")
WITH_BIAS = (*FEATURES, "logit_bias")
ALL = (*WITH_BIAS, "image_features_projected", "text_features_projected", "logit_scale_proto")


def proto_loss(prototypes=EPISODE, **settings):
    loss = ProtoLoss(target_temperature=0.1, **settings)
    loss.set_prototypes(prototypes)
    return loss


# name: (the loss, the outputs that it takes, its arguments)
LOSSES = {
    "InfoNCE": (InfoNCE, FEATURES, {}),
    "InfoNCE, ids": (lambda: InfoNCE(repeats="share"), FEATURES, {"ids": torch.arange(B) // 2}),
    "SigmoidPairLoss": (SigmoidPairLoss, WITH_BIAS, {}),
    "ProtoLoss": (proto_loss, ALL, {"index": INDEX}),
    "ProtoLoss, sigmoid, parts": (lambda: proto_loss(pair_loss="sigmoid"), ALL, {"index": INDEX, "output_dict": True}),
    "ProtoLoss, warm-up": (lambda: proto_loss(None), ALL, {"index": INDEX}),
}


def towers(names, between=nn.Identity, dtype=torch.float64):
    torch.manual_seed(0)
    return Towers(names, between).to(dtype)


def total(loss):
    return sum(loss.values()) if isinstance(loss, dict) else loss


def plain(model, loss, arguments, chunk_size=B):
    """The features of each chunk with their graph, put together: the large batch, in the memory of it."""
    outputs = [model(*x) for x in zip(IMAGES.split(chunk_size), TEXTS.split(chunk_size), strict=True)]
    joined = {k: torch.cat([out[k] for out in outputs]) if x.dim() > 1 else outputs[-1][k] for k, x in outputs[0].items()}
    value = loss(**joined, **arguments)
    total(value).backward()
    return value


def assert_same_gradients(one, other, tolerance=1e-10):
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if y.grad is not None:
            assert_near(x.grad, y.grad, tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 100])
def test_gradients_are_those_of_the_large_batch(name, chunk_size):
    make, names, arguments = LOSSES[name]
    model, reference = towers(names), towers(names)
    wanted = plain(reference, make(), arguments)
    loss = GradCache(make(), chunk_size)(model, IMAGES, TEXTS, **arguments)
    assert_same_gradients(model, reference)
    assert model.logit_scale.grad.norm() > 0
    assert isinstance(loss, dict) == isinstance(wanted, dict)
    for got, want in zip(*([x.values() if isinstance(x, dict) else [x] for x in (loss, wanted)]), strict=True):
        assert not got.requires_grad
        assert_near(got, want)


def test_in_float32_to_one_in_a_hundred_thousand():
    model, reference = (towers(ALL, dtype=torch.float32) for _ in range(2))
    inputs = IMAGES.float(), TEXTS.float()
    total(proto_loss()(**reference(*inputs), index=INDEX)).backward()
    GradCache(proto_loss(), 5)(model, *inputs, index=INDEX)
    assert_same_gradients(model, reference, 1e-5)


@pytest.mark.parametrize(("chunk_size", "wanted"), [(5, [5, 5, 5, 5, 2] * 2), (11, [11] * 4), (22, [22]), (30, [22])])
def test_how_often_the_encoders_run(chunk_size, wanted):
    model = towers(FEATURES)
    GradCache(InfoNCE(), chunk_size)(model, IMAGES, TEXTS)
    assert model.rows == wanted


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_each_chunk_runs_once(mode):
    model = towers(FEATURES)
    with mode():
        loss = GradCache(InfoNCE(), 5)(model, IMAGES, TEXTS)
        assert_near(loss, InfoNCE()(**model(IMAGES, TEXTS)))
    assert model.rows == [5, 5, 5, 5, 2, 22]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk_size", [5, 22])
def test_dropout_drops_the_same_units_again(chunk_size):
    model, reference = (towers(FEATURES, lambda: nn.Dropout(0.5)) for _ in range(2))
    torch.manual_seed(1)
    wanted = plain(reference, InfoNCE(), {}, chunk_size)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert_near(GradCache(InfoNCE(), chunk_size)(model, IMAGES, TEXTS), wanted)
    assert_same_gradients(model, reference)
    assert torch.equal(torch.rand(3), after)  # random numbers go on as after one run


def test_random_numbers_of_the_loss_are_not_drawn_again():
    def noisy(*features):
        return InfoNCE()(*(x + 0.1 * torch.rand_like(x) for x in features[:2]), features[2])

    model, reference = (towers(FEATURES, lambda: nn.Dropout(0.5)) for _ in range(2))
    torch.manual_seed(1)
    wanted = plain(reference, lambda **x: noisy(*x.values()), {}, 5)
    torch.manual_seed(1)
    assert_near(GradCache(lambda **x: noisy(*x.values()), 5)(model, IMAGES, TEXTS), wanted)
    assert_same_gradients(model, reference)


def test_random_states_are_also_those_of_devices(monkeypatch):
    """A GPU's generator, by what torch asks of the module of a device."""
    numbers = {torch.device("cuda", i): 10 * i for i in range(2)}
    module = types.SimpleNamespace(get_rng_state=numbers.get, set_rng_state=lambda state, device: numbers.update({device: state}))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    state = RandomState(numbers)
    numbers.update(dict.fromkeys(numbers, 99))
    with state.replayed():
        assert list(numbers.values()) == [0, 10]
    assert list(numbers.values()) == [99, 99]


def test_the_random_state_goes_on_after_an_error():
    class Fails(Towers):
        def forward(self, *x):
            if len(self.rows) == 6:
                raise KeyError("in the second run")
            return super().forward(*x)

    model, reference = Fails(FEATURES, lambda: nn.Dropout(0.5)).double(), towers(FEATURES, lambda: nn.Dropout(0.5))
    torch.manual_seed(1)
    with pytest.raises(KeyError):
        GradCache(InfoNCE(), 5)(model, IMAGES, TEXTS)
    after = torch.rand(3)
    torch.manual_seed(1)
    plain(reference, InfoNCE(), {}, 5)
    assert torch.equal(torch.rand(3), after)


def test_batch_norm_takes_each_chunk_in_once():
    model, reference = (towers(FEATURES, lambda: nn.BatchNorm1d(9)) for _ in range(2))
    wanted = plain(reference, InfoNCE(), {}, 11)
    assert_near(GradCache(InfoNCE(), 11)(model, IMAGES, TEXTS), wanted)
    assert_same_gradients(model, reference)
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(one, other)
    assert model.image[1].num_batches_tracked == 2


def test_a_forward_that_depends_on_buffers_runs_again_from_the_same_ones():
    """Spectral norm takes a step of power iteration in each forward, so its weight is another one each time."""

    def spectral():
        return nn.utils.parametrizations.spectral_norm(nn.Linear(9, 9))

    model, reference = (towers(FEATURES, spectral) for _ in range(2))
    wanted = plain(reference, InfoNCE(), {}, 5)
    assert_near(GradCache(InfoNCE(), 5)(model, IMAGES, TEXTS), wanted)
    assert_same_gradients(model, reference, 1e-8)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_the_callers_autocast(low):
    """In both runs: weights that autocast has cast without a graph are not used again, where they would get no gradient."""
    model, reference, truth = (towers(FEATURES, dtype=torch.float32) for _ in range(3))
    inputs = IMAGES.float(), TEXTS.float()
    with torch.autocast("cpu", low):
        wanted = InfoNCE()(**reference(*inputs))
        loss = GradCache(InfoNCE(), 5)(model, *inputs)
        assert torch.is_autocast_enabled("cpu")
    wanted.backward()
    InfoNCE()(**truth(*inputs)).backward()
    assert_near(loss, wanted, 1e-6)
    for (name, x), y, z in zip(model.named_parameters(), reference.parameters(), truth.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if y.grad is not None:
            assert (x.grad - z.grad).norm() <= 1.5 * (y.grad - z.grad).norm() + 1e-2 * z.grad.norm(), name


def test_a_scaler_scales_the_gradient_and_not_the_loss():
    model, reference = towers(FEATURES), towers(FEATURES)
    wanted = plain(reference, InfoNCE(), {})
    for p in reference.parameters():
        p.grad = None if p.grad is None else p.grad * 8
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for chunk_size in (5, 22):
        model.zero_grad()
        assert_near(GradCache(InfoNCE(), chunk_size, scaler=scaler)(model, IMAGES, TEXTS), wanted)
        assert_same_gradients(model, reference)


def test_gradients_are_added_to_those_that_are_there():
    model, reference = towers(FEATURES), towers(FEATURES)
    for _ in range(2):
        plain(reference, InfoNCE(), {})
        GradCache(InfoNCE(), 5)(model, IMAGES, TEXTS)
    assert_same_gradients(model, reference)


def test_parameters_of_the_loss_get_a_gradient():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, **x):
            return self.weight * InfoNCE()(**x)

    loss = Weighted()
    value = GradCache(loss, 5)(towers(FEATURES), IMAGES, TEXTS)
    assert_near(loss.weight.grad * 3, value)


def test_a_locked_tower():
    model, reference = towers(FEATURES), towers(FEATURES)
    for m in (model, reference):
        m.image.requires_grad_(False)
    plain(reference, InfoNCE(), {})
    GradCache(InfoNCE(), 5)(model, IMAGES, TEXTS)
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("chunk_size", [5, 22])
def test_a_model_without_anything_to_train_is_an_error(chunk_size):
    with pytest.raises(RuntimeError, match=r"require"):
        GradCache(InfoNCE(), chunk_size)(towers(FEATURES).requires_grad_(False), IMAGES, TEXTS)


def test_a_model_may_return_a_tuple_or_one_tensor():
    model, reference = towers(WITH_BIAS), towers(WITH_BIAS)
    plain(reference, SigmoidPairLoss(), {})
    GradCache(SigmoidPairLoss(), 5)(lambda *x: tuple(model(*x).values()), IMAGES, TEXTS)
    assert_same_gradients(model, reference)
    linear = nn.Linear(7, 2).double()
    GradCache(lambda z: z.square().mean(), 5)(linear, IMAGES)
    (want,) = torch.autograd.grad(linear(IMAGES).square().mean(), [linear.weight])
    assert_near(linear.weight.grad, want)


def test_inputs_of_a_tokenizer_lists_and_what_has_no_rows():
    """A mapping is passed as keywords; strings are split as lists; numbers and None are passed whole."""
    seen = []
    model = towers(FEATURES)

    def encode(images, *, captions, attention_mask, factor, nothing):
        assert nothing is None
        assert len(images) == len(captions) == len(attention_mask)
        seen.extend(captions)
        texts = torch.stack([TEXTS[int(caption)] for caption in captions])
        return model(images, factor * texts * attention_mask)

    captions, ones = [str(i) for i in range(B)], torch.ones(B, 1)
    batch = {"captions": captions, "attention_mask": ones, "factor": torch.tensor(1.0), "nothing": None}
    reference = towers(FEATURES)
    wanted = plain(reference, InfoNCE(), {})
    assert_near(GradCache(InfoNCE(), 5)(encode, IMAGES, batch), wanted)
    assert_same_gradients(model, reference)
    assert seen == captions * 2


def test_further_modalities_are_a_mapping_in_the_output():
    prototypes = episode(modalities=("image", "text", "audio"))
    names = ("image_features_projected", "text_features_projected")

    def outputs(model):
        def forward(images, texts):
            out = model(images, texts)
            image, text = out.pop(names[0]), out.pop(names[1])
            return {"image_features": image, "text_features": text, "features": {"audio": (image + text) / 2}, **out}

        return forward

    model, reference = (towers((*names, "logit_scale", "logit_scale_proto")) for _ in range(2))
    wanted = proto_loss(prototypes)(**outputs(reference)(IMAGES, TEXTS), index=prototypes.index[:B])
    wanted.backward()
    assert_near(GradCache(proto_loss(prototypes), 5)(outputs(model), IMAGES, TEXTS, index=prototypes.index[:B]), wanted)
    assert_same_gradients(model, reference)


def test_online_prototypes_take_each_batch_in_once():
    loss, whole = (proto_loss(OnlinePrototypes(4, queue_size=2 * B, every=2, warmup=1)) for _ in range(2))
    model, reference = (towers(ALL) for _ in range(2))
    cached = GradCache(loss, 5)
    for _ in range(4):
        cached(model, IMAGES, TEXTS)
        plain(reference, whole, {})
        assert_same_gradients(model, reference)
    assert loss.prototypes.step == whole.prototypes.step == 4


def test_memory_is_that_of_a_chunk():
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 2048), nn.GELU(), nn.Linear(2048, 8))

    x = unit(1024, 16, dtype=torch.float32)
    loss = lambda z: InfoNCE()(F.normalize(z, dim=1), F.normalize(z.flip(0), dim=1), 10.0)  # noqa: E731
    model = wide()
    whole, _ = cost(lambda: loss(model(x)).backward())
    model.zero_grad()
    chunked, _ = cost(lambda: GradCache(loss, 64)(model, x))
    assert whole > 24 * 2**20
    assert chunked < whole / 2


def test_it_is_shown_with_its_settings():
    assert repr(GradCache(InfoNCE(), 5)) == "GradCache(InfoNCE, chunk_size=5, scaler=None)"
    cached = copy.deepcopy(GradCache(proto_loss(), 5))
    assert math.isfinite(cached(towers(ALL), IMAGES, TEXTS, index=INDEX))


def test_bad_settings():
    for arguments, error, message in [
        ((None, 5), TypeError, "loss must be a module or a function of features, got NoneType"),
        ((InfoNCE(), 0), ValueError, "chunk_size must be at least 1, got 0"),
        ((InfoNCE(), 2.5), TypeError, "chunk_size must be an int, got float"),
    ]:
        with pytest.raises(error, match=message):
            GradCache(*arguments)
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler or None, got float"):
        GradCache(InfoNCE(), 5, scaler=8.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, m: c(m, IMAGES, TEXTS[:4]), ValueError, r"inputs must have the same number of rows, got {'0': 22, '1': 4}"),
        (lambda c, m: c(m, IMAGES, {"texts": TEXTS[:4]}), ValueError, r"same number of rows, got {'0': 22, 'texts': 4}"),
        (lambda c, m: c(m), TypeError, r"inputs must hold a tensor or a list with rows, got \[\]"),
        (lambda c, m: c(m, 3.0, None), TypeError, r"a tensor or a list with rows, got \['float', 'NoneType'\]"),
        (lambda c, m: c(m, (IMAGES, TEXTS)), TypeError, "input 0 must be a tensor, .* got a tuple: pass its items one by one"),
        (lambda c, m: c(m, IMAGES[:0], TEXTS[:0]), ValueError, "inputs must have at least one row, got 0"),
        (
            lambda c, m: c(lambda x, y: {**m(x, y), "image_features": torch.ones(3, 6)}, IMAGES, TEXTS),
            ValueError,
            r"output 'image_features' of the model must have 5 rows as its inputs, got shape \(3, 6\)",
        ),
        (
            lambda c, m: c(lambda x, y: {**m(x, y), "logit_scale": x.sum().abs()}, IMAGES, TEXTS),
            ValueError,
            "output 'logit_scale' of the model must be the same for every chunk",
        ),
        (lambda c, m: c(m, IMAGES, TEXTS, typo=1), TypeError, "typo"),
        (lambda c, m: GradCache(lambda **x: "loss", 5)(m, IMAGES, TEXTS), TypeError, "loss must return a tensor, .* got str"),
    ],
    ids=range(10),
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(GradCache(InfoNCE(), 5), towers(FEATURES))
