"""torch.compile around a loss in online mode: eager's values and gradients, through warm-up and several sets of prototypes."""

import shutil
from inspect import signature

import pytest
import torch
from cases import assert_near
from helpers import seeded
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from protoclip_losses import OnlinePrototypes, ProtoLoss

STEPS, BATCH, WIDTH = 26, 8, 6


class Model(nn.Module):
    """Two encoders and a loss in online mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.loss = ProtoLoss(target_temperature=0.3, external_target_temperature=0.3)
        self.loss.set_prototypes(OnlinePrototypes(num_prototypes=5, queue_size=40, every=3, warmup=4))

    def forward(self, image, text, teacher):
        features = (nn.functional.normalize(f(x), dim=1) for f, x in ((self.image, image), (self.text, text)))
        return self.loss(*features, 10.0, teacher_features={"minilm": teacher})


def train(compiled):
    """The loss and the gradient of every parameter in each step, and the model."""
    torch._dynamo.reset()
    model = Model()
    call = compiled(model)
    generator, seen = seeded(1), []
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(STEPS):
        image = torch.randn(BATCH, WIDTH, generator=generator)
        text = image + 0.3 * torch.randn(BATCH, WIDTH, generator=generator)
        optimizer.zero_grad()
        value = call(image.requires_grad_(), text, text.roll(1, 1))
        value.backward()
        seen.append(torch.cat([value.detach()[None], *(x.grad.flatten() for x in model.parameters())]))
        optimizer.step()
    return torch.stack(seen), model


@pytest.fixture(scope="module")
def eager():
    return train(lambda model: model)


def assert_same(compiled, eager):
    assert_near(compiled[0], eager[0], 1e-5)
    assert repr(compiled[1].loss.prototypes) == repr(eager[1].loss.prototypes)
    assert eager[1].loss.prototypes.version == 8
    assert compiled[1].loss.metrics.keys() == eager[1].loss.metrics.keys()


def compile_loss(model, **options):
    model.loss = torch.compile(model.loss, **options)
    return model


def compile_in_place(model, **options):
    model.loss.compile(**options)
    return model


def compile_checkpointed(model, **options):
    return torch.compile(lambda *x: checkpoint(model, *x, use_reentrant=False), **options)


@pytest.mark.parametrize("compiled", [torch.compile, compile_loss, compile_in_place, compile_checkpointed])
def test_values_gradients_and_prototypes_are_eagers(compiled, eager):
    assert_same(train(lambda model: compiled(model, backend="aot_eager")), eager)


def test_with_dynamic_shapes(eager):
    assert_same(train(lambda model: torch.compile(model, backend="aot_eager", dynamic=True)), eager)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(eager):
    assert_same(train(torch.compile), eager)


def test_nothing_is_compiled_again_as_prototypes_change():
    """The encoders are one graph, and the loss is in none."""
    counter = CompileCounterWithBackend("aot_eager")
    train(lambda model: torch.compile(model, backend=counter))
    assert counter.frame_count == 1


def test_one_graph_is_refused_with_a_hint():
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        train(lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"))
    if "reason" in signature(torch.compiler.disable).parameters:  # torch 2.4 names the function alone
        assert "compile without fullgraph=True" in str(error.value)


def test_without_prototypes_and_before_online_mode_there_is_one_graph():
    torch._dynamo.reset()
    model = Model()
    model.loss.set_prototypes(None)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    x = nn.functional.normalize(torch.randn(BATCH, WIDTH, generator=seeded(0)), dim=1)
    assert_near(compiled(x, x.roll(1, 1), 10.0), model.loss(x, x.roll(1, 1), 10.0))
