"""Gradient accumulation, GradCache, another pair loss, a locked tower and FSDP2, each against one plain step."""

import copy

import pytest
import torch
from cases import assert_near
from host_own_loop import Clip, train
from host_pairs import PicturePairs
from host_practices import accumulate, grad_cache, lock_image_tower, with_another_pair_loss

from protoclip_losses import EpisodicClusterer, FeatureBank, ProjectionHead, ProtoLoss
from protoclip_losses.functional import sigmoid_pair_loss

ROWS = 24


@pytest.fixture(scope="module")
def setting():
    """A model of layer norms in float64, a batch, and the prototypes of it."""
    torch.manual_seed(0)
    pairs = PicturePairs(ROWS)
    model = Clip()
    for tower in ("image", "text"):
        setattr(model.proto, tower, ProjectionHead(64, 32, 64, norm="layer"))
    model.double()
    batch = pairs.pixel_values.double(), pairs.input_ids, torch.arange(ROWS)
    with torch.no_grad():
        out = model(*batch[:2])
    bank = FeatureBank(batch[2], 32, dtype=torch.float64)
    bank.update(batch[2], out["image_features_projected"], out["text_features_projected"])
    return model, batch, EpisodicClusterer(4).build(bank)


def loss_of(setting, **options):
    loss = ProtoLoss(**options)
    loss.set_prototypes(setting[2])
    return loss


def gradients(setting, step):
    """Gradients that a step leaves on a copy of the model."""
    model = copy.deepcopy(setting[0])
    step(model)
    return {name: p.grad for name, p in model.named_parameters()}


def plain(loss, batch):
    def step(model):
        images, texts, index = batch
        loss(**model(images, texts), index=index).backward()

    return step


def assert_same_gradients(one, other):
    for name in other:
        assert_near(one[name], other[name], 1e-6)  # the prototypes' means are float32
        assert other[name].norm() > 0 or "self_attn.in_proj_bias" in name


def test_grad_cache_is_the_whole_batch(setting):
    batch = setting[1]
    loss = loss_of(setting)
    cached = gradients(setting, lambda m: grad_cache(m, loss, batch, chunk_size=7))
    assert_same_gradients(cached, gradients(setting, plain(loss, batch)))


def test_accumulation_is_the_whole_batch_for_prototype_terms_alone(setting):
    parts = list(zip(*(x.split(8) for x in setting[1]), strict=True))
    for w_clip, same in ((0.0, True), (1.0, False)):
        loss = loss_of(setting, w_clip=w_clip)
        one = gradients(setting, lambda m, loss=loss: accumulate(m, loss, parts))[
            "proto.image.0.weight" if same else "image.project.weight"
        ]
        whole = gradients(setting, plain(loss, setting[1]))["proto.image.0.weight" if same else "image.project.weight"]
        assert ((one - whole).norm() < 1e-6 * whole.norm()) == same


def sigmoid_loss(image, text, scale):
    return sigmoid_pair_loss(image, text, scale, -10.0)


def test_another_pair_loss(setting):
    images, texts, _ = setting[1]
    got = gradients(setting, lambda m: with_another_pair_loss(m, sigmoid_loss, loss_of(setting, w_clip=0.0), setting[1]))
    terms = gradients(setting, plain(loss_of(setting, w_clip=0.0), setting[1]))

    def sigmoid_alone(model):
        out = model(images, texts)
        sigmoid_loss(out["image_features"], out["text_features"], out["logit_scale"]).backward()

    pair = gradients(setting, sigmoid_alone)
    for name, x in got.items():
        assert_near(x, terms[name] + (0 if pair[name] is None else pair[name]), 1e-6)


def test_a_locked_tower(setting):
    free = gradients(setting, plain(loss_of(setting), setting[1]))

    def locked(model):
        lock_image_tower(model)
        plain(loss_of(setting), setting[1])(model)

    for name, x in gradients(setting, locked).items():
        if name.startswith("image."):
            assert x is None
        else:
            assert torch.equal(x, free[name])


def test_a_loop_of_ones_own(capsys):
    losses = train(rows=128, num_episodes=3)
    assert len(losses) == 6
    assert sum(losses[-2:]) < sum(losses[:2])
    assert capsys.readouterr().out.count("episode") == 3
