"""Activation checkpointing around a loss in online mode: it is run twice, and counts once."""

import copy
import gc
import pickle

import pytest
import torch
from cases import assert_near, leaf
from helpers import seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from protoclip_losses import OnlinePrototypes, ProtoLoss
from protoclip_losses.distributed import RankRows
from protoclip_losses.prototypes import BatchFeatures

BATCH, WIDTH = 8, 6
SETTINGS = {"num_prototypes": 5, "queue_size": 40, "every": 3, "warmup": 3}


class Model(nn.Module):
    """Two encoders with dropout, and a loss in online mode."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.loss = ProtoLoss(target_temperature=0.3)
        self.loss.set_prototypes(OnlinePrototypes(**{**SETTINGS, **settings}))

    def features(self, image, text):
        return [nn.functional.normalize(f(self.dropout(x)), dim=1) for f, x in ((self.image, image), (self.text, text))]

    def forward(self, image, text):
        return self.loss(*self.features(image, text), 10.0)

    @property
    def prototypes(self):
        return self.loss.prototypes


def batches(count):
    generator = seeded(1)
    for _ in range(count):
        image = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        yield image, image.detach() + 0.3 * torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)


def train(model, call, steps=22, accumulate=1):
    """The loss and the gradient of every parameter in each step."""
    torch.manual_seed(2)  # of the dropout
    optimizer, data, seen = torch.optim.SGD(model.parameters(), 0.5), batches(steps * accumulate), []
    for _ in range(steps):
        optimizer.zero_grad()
        total = sum(call(model, *next(data)) for _ in range(accumulate))
        total.backward()
        seen.append(torch.cat([total.detach()[None], *(x.grad.flatten() for x in model.parameters())]))
        optimizer.step()
    return torch.stack(seen)


def plain(model, *batch):
    return model(*batch)


def checkpointed(model, *batch):
    return checkpoint(model, *batch, use_reentrant=False)


def reentrant(model, *batch):
    return checkpoint(model, *batch, use_reentrant=True)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("twice", [checkpointed, reentrant])
def test_a_checkpointed_run_is_a_plain_one(twice, every):
    one, other = Model(every=every), Model(every=every)
    assert torch.equal(train(one, plain), train(other, twice))
    assert repr(one.prototypes) == repr(other.prototypes)
    assert one.prototypes.version > 3
    for name, x in one.prototypes.queue.features.items():
        assert torch.equal(x, other.prototypes.queue.features[name])
    assert one.loss.metrics == other.loss.metrics


@pytest.mark.parametrize("accumulate", [2, 3])
def test_calls_whose_backward_comes_later_have_the_prototypes_that_they_were_computed_with(accumulate):
    """Prototypes change between the calls of a step, in which each is run again."""
    one, other = Model(every=1), Model(every=1)
    assert torch.equal(train(one, plain, accumulate=accumulate), train(other, checkpointed, accumulate=accumulate))
    assert repr(one.prototypes) == repr(other.prototypes)


def test_reentrant_calls_are_taken_in_by_backward_in_its_order():
    """Until then the prototypes are those of the first call."""

    def together(model, *pairs):
        model.loss.eval()
        batches = [model.features(*pair) for pair in pairs]
        total = sum(model.loss(*features, 10.0) for features in batches)
        total.backward()
        for image, text in reversed(batches):
            model.prototypes.observe(BatchFeatures({"image": image, "text": text}, {}), {}, RankRows(None, [BATCH]))

    one, other, data = Model(every=1), Model(every=1), list(batches(24))
    for start in range(0, 24, 2):
        torch.manual_seed(start)
        together(one, *data[start : start + 2])
        torch.manual_seed(start)
        sum(reentrant(other, *pair) for pair in data[start : start + 2]).backward()
        for x, y in zip(one.parameters(), other.parameters(), strict=True):
            assert_near(x.grad, y.grad, 1e-12)
    assert repr(one.prototypes) == repr(other.prototypes)
    assert one.prototypes.step == 24


@pytest.mark.parametrize("twice", [checkpointed, reentrant])
def test_samples_of_several_calls_in_a_step_are_taken_in_once(twice):
    """open_clip's --accum-freq: the loss is called for all the samples of a step as often as there are parts of them."""

    def train_in_parts(model, call):
        data = list(batches(12))
        for start in range(0, 12, 2):
            cached = [[x.detach() for x in model.features(*pair)] for pair in data[start : start + 2]]
            for part in range(2):

                def forward(*pair, part=part, cached=cached):
                    own = [*cached]
                    own[part] = model.features(*pair)
                    return model.loss(*(torch.cat(side) for side in zip(*own, strict=True)), 10.0)

                call(forward, *data[start + part]).backward()
        return torch.cat([x.grad.flatten() for x in model.parameters()])

    one, other = (Model(calls_per_step=2, every=2).eval() for _ in range(2))
    one.loss.train(), other.loss.train()
    assert torch.equal(train_in_parts(one, plain), train_in_parts(other, twice))
    assert repr(one.prototypes) == repr(other.prototypes)
    assert one.prototypes.step == 6
    assert one.prototypes.queue.seen == other.prototypes.queue.seen == 6 * 2 * BATCH


def test_a_graph_that_is_run_backward_twice():
    model = Model(every=1)
    for pair in batches(6):
        loss = checkpointed(model, *pair)
        one = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        other = torch.autograd.grad(loss, list(model.parameters()))
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    assert model.prototypes.step == 6


def test_equal_batches_count_each_time():
    pair = next(batches(1))
    for twice in (checkpointed, reentrant):
        model = Model()
        for _ in range(5):
            twice(model, *pair).backward()
        assert model.prototypes.step == 5


def test_an_encoder_that_is_checkpointed_alone():
    def inner(model, image, text):
        return model.loss(*checkpoint(model.features, image, text, use_reentrant=False), 10.0)

    one, other = Model(), Model()
    assert torch.equal(train(one, plain), train(other, inner))
    assert repr(one.prototypes) == repr(other.prototypes)


def test_evaluation_between_the_two_runs():
    model, same = Model().eval(), Model().eval()
    for step, pair in enumerate(batches(12)):
        model.loss.train(), same.loss.train()
        loss = checkpointed(model, *pair)
        other = plain(same, *pair)
        model.loss.eval(), same.loss.eval()
        with torch.no_grad():
            model(*pair)
        loss.backward(), other.backward()
        assert model.prototypes.step == same.prototypes.step == step + 1
        for x, y in zip(model.parameters(), same.parameters(), strict=True):
            assert_near(x.grad, y.grad, 1e-5)


def test_nothing_of_a_step_is_kept_after_it():
    """Not the constants of old prototypes either."""
    model = Model(every=1)
    train(model, checkpointed, steps=6)
    old = model.loss._terms
    calls = model.loss._calls
    train(model, plain, steps=2)
    del old
    gc.collect()
    assert sum(ref() is not None for ref in calls._with_graph) == 0
    assert calls._without_graph == []


def test_a_loss_that_is_being_run_can_be_copied_and_pickled():
    model = Model()
    train(model, plain, steps=5)
    *_, pair = batches(6)
    loss = checkpointed(model, *pair)
    for other in (copy.deepcopy(model.loss), pickle.loads(pickle.dumps(model.loss))):
        assert repr(other) == repr(model.loss)
        features = [leaf(x) for x in model.features(*pair)]
        assert torch.equal(copy.deepcopy(model.loss)(*features, 10.0), other(*features, 10.0))
    loss.backward()
