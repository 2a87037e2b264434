"""Online mode under settings of the process, and in evaluation: neither changes what is trained."""

import math
import random
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from cases import assert_near, leaf
from helpers import assert_same_state, in_new_process, seeded

from protoclip_losses import OnlinePrototypes, ProtoLoss

BATCH, WIDTH, WARMUP, STEPS = 8, 6, 3, 20
WARNING = "features that need no gradient are taken in by the prototypes"


def online_loss(**settings):
    loss = ProtoLoss(target_temperature=0.3)
    loss.set_prototypes(OnlinePrototypes(num_prototypes=5, queue_size=40, every=3, warmup=WARMUP, **settings))
    return loss


def pair(step):
    """Features that turn, so that centroids are lost and come back."""
    direction = torch.tensor([math.cos(step / 3), math.sin(step / 3), 0, 0, 0, 0], dtype=torch.float32, device="cpu")
    noise = torch.randn(BATCH, WIDTH, generator=seeded(step), dtype=torch.float32, device="cpu")
    image = torch.nn.functional.normalize(3 * direction + noise, dim=1)
    return image, image.roll(1, 1)


def train(loss, steps, around=nullcontext):
    """Losses and gradients of these steps, each computed ``around`` something."""
    seen = []
    for step in steps:
        image, text = pair(step)
        with around():
            image = leaf(image)
            value = loss(image, text, 10.0)
            value.backward()
        seen.append(torch.cat([value.detach()[None], image.grad.flatten()]))
    return torch.stack(seen)


def state(loss):
    return loss.state_dict()["_extra_state"]["prototypes"]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS = {
    "default device": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "deterministic": deterministic,
    "more threads": lambda: threads(3),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_process_change_no_bit(setting):
    one, other = online_loss(), online_loss()
    with threads(2):  # a single thread may add in another order than several
        train(one, range(WARMUP)), train(other, range(WARMUP))
        wanted = train(one, range(WARMUP, STEPS))
        assert torch.equal(train(other, range(WARMUP, STEPS), SETTINGS[setting]), wanted)
    assert_same_state(state(one), state(other))
    assert min(float(x) for x in one.prototypes.in_use.values()) < 1


def test_autocast_changes_no_prototype():
    one, other = online_loss(), online_loss()
    train(one, range(STEPS))
    train(other, range(STEPS), lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert_same_state(state(one), state(other))


def test_no_global_random_number_is_drawn():
    def drawn():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = drawn()
    train(online_loss(), range(STEPS))
    assert drawn() == before


def evaluate(loss, *contexts, gradient=False, training=True):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        loss.train(training)
        image, text = pair(99)
        loss(leaf(image) if gradient else image, text, 10.0)
        loss.train()


@pytest.mark.parametrize(
    ("contexts", "options"),
    [
        ([torch.no_grad], {}),
        ([torch.inference_mode], {}),
        ([torch.inference_mode], {"training": False}),
        ([], {"training": False}),
        ([], {"training": False, "gradient": True}),
    ],
    ids=["no_grad", "inference_mode", "inference_mode and eval", "eval", "eval with gradients"],
)
def test_evaluation_after_every_step_changes_nothing_and_is_no_misuse(contexts, options):
    one, other = online_loss(), online_loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            wanted = train(one, [step])
            assert_near(train(other, [step]), wanted, 1e-5)  # rows of soft targets round by which were computed together
            evaluate(other, *contexts, **options)
    assert_same_state(state(one), state(other))


def test_prototypes_that_are_set_or_loaded_in_inference_mode_can_be_trained_with():
    one = online_loss()
    train(one, range(7))
    with torch.inference_mode():
        other = online_loss()
        other.load_state_dict(one.state_dict())
        third = ProtoLoss(target_temperature=0.3)
        third.set_prototypes(OnlinePrototypes.from_state_dict(state(one)))
    wanted = train(one, range(7, STEPS))
    assert_near(train(other, range(7, STEPS)), wanted, 1e-5)
    assert_near(train(third, range(7, STEPS)), wanted, 1e-5)


def test_a_training_step_without_anything_to_train_warns_once():
    loss = online_loss()
    with pytest.warns(UserWarning, match=f"{WARNING}, as a training step: evaluate with loss.eval") as caught:
        [loss(*pair(step), 10.0) for step in range(5)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert loss.prototypes.step == 5  # they count, as before


def test_a_tower_that_is_locked_is_no_misuse():
    loss = online_loss()
    image, text = pair(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(image, leaf(text), 10.0)
        loss(image, text, 10.0, image_features_projected=leaf(image), text_features_projected=text)
    assert loss.prototypes.step == 2


CONTINUE = """
import sys, torch
from test_online_surroundings import STEPS, state, train
loss = torch.load(sys.argv[1], weights_only=False)
torch.save((train(loss, range(8, STEPS)), state(loss)), sys.argv[2])
"""


def test_a_pickled_loss_goes_on_in_a_new_process(tmp_path, request):
    loss = online_loss()
    train(loss, range(8))
    torch.save(loss, tmp_path / "loss.pt")
    wanted = train(loss, range(8, STEPS))
    in_new_process(CONTINUE, tmp_path / "loss.pt", tmp_path / "done.pt", folders=[request.path.parent])
    seen, done = torch.load(tmp_path / "done.pt", weights_only=True)
    assert torch.equal(seen, wanted)
    assert_same_state(done, state(loss))
