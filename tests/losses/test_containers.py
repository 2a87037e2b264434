"""A model that holds the loss, in the hands of what other codebases do with models: averages, files, copies, processes."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import episode, leaf, unit
from helpers import in_new_process

from protoclip_losses import FeatureBank, OnlinePrototypes, ProtoLoss, PrototypicalBackTranslation
from protoclip_losses.prototypes.extra_state import pack, unpack

EPISODE = episode(teachers=("roberta",), empty=(1,))
INDEX = EPISODE.index[:11]
TEXT = unit(11, 5, 1, torch.float32)


class Model(torch.nn.Module):
    """A head, the loss behind it, and a parameter after it, which would be misplaced if the loss had other keys."""

    def __init__(self, prototypes=None):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = torch.nn.Linear(5, 5), ProtoLoss(target_temperature=0.3)
        self.after = torch.nn.Linear(5, 2)
        self.loss.set_prototypes(prototypes)

    def forward(self, x, **index):
        return self.loss(torch.nn.functional.normalize(self.head(x), dim=1), TEXT, 9.0, **index)


def online():
    return OnlinePrototypes(num_prototypes=3, queue_size=40, every=2, warmup=2)


SOURCES = {"episode": (lambda: EPISODE, {"index": INDEX}), "online": (online, {})}


def trained(kind):
    source, arguments = SOURCES[kind]
    model = Model(source())
    for step in range(4):
        model(unit(11, 5, step + 7, torch.float32), **arguments)
    return model, arguments


def after(model, arguments):
    """What the model goes on to do."""
    return [float(model(unit(11, 5, step + 50, torch.float32), **arguments).detach()) for step in range(5)]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_entry_of_a_state_dict_is_a_tensor(kind):
    model, _ = trained(kind)
    assert all(isinstance(x, torch.Tensor) for x in model.state_dict().values())
    assert list(Model().state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("kind", SOURCES)
def test_state_dict_through_a_file(kind, tmp_path):
    model, arguments = trained(kind)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert isinstance(state["loss._extra_state"], dict)  # as 0.7.0 saved it
    other = Model(online())
    other.load_state_dict(state)
    assert after(other, arguments) == after(model, arguments)


@pytest.mark.parametrize("kind", SOURCES)
def test_safetensors(kind, tmp_path):
    st = pytest.importorskip("safetensors.torch")
    model, arguments = trained(kind)
    st.save_model(model, tmp_path / "model.safetensors")
    other = Model()
    st.load_model(other, tmp_path / "model.safetensors")
    st.save_file(model.state_dict(), tmp_path / "state.safetensors")
    third = Model()
    third.load_state_dict(st.load_file(tmp_path / "state.safetensors"))
    wanted = after(model, arguments)
    assert after(other, arguments) == wanted
    assert after(third, arguments) == wanted


@pytest.mark.parametrize("kind", SOURCES)
def test_distributed_checkpoint_into_fresh_objects(kind, tmp_path):
    model, arguments = trained(kind)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    other = Model()
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict(state["model"])
    assert after(other, arguments) == after(model, arguments)


def test_a_bank_out_of_a_distributed_checkpoint_is_whole_or_an_error(tmp_path):
    """The reader fills what a fresh bank has, and it has no features."""
    bank = FeatureBank.from_features(torch.arange(3), image=unit(3, 2), text=unit(3, 2, 1))
    dcp.save({"bank": bank.state_dict()}, checkpoint_id=tmp_path / "bank")
    fresh = FeatureBank(torch.arange(3), dim=2)
    state = {"bank": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "bank")
    with pytest.raises(ValueError, match="must hold the features of"):
        fresh.load_state_dict(state["bank"])
    assert fresh.missing == 3


class Average:
    """An average over ``state_dict()``, as timm's ModelEmaV2 and V3 compute it (V3 in place where entries are floats)."""

    def __init__(self, model, in_place):
        self.module, self.in_place = copy.deepcopy(model).eval(), in_place

    @torch.no_grad()
    def update(self, model):
        for own, other in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if not self.in_place:
                own.copy_(0.9 * own + 0.1 * other)
            elif own.is_floating_point():
                own.lerp_(other, 0.1)
            else:
                own.copy_(other)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_an_average_over_state_dict_averages_weights_and_leaves_the_loss_alone(kind, in_place):
    source, arguments = SOURCES[kind]
    model = Model()
    average = Average(model, in_place)
    model.loss.set_prototypes(source())  # the average was made before, with another state
    model(unit(11, 5, 3, torch.float32), **arguments)
    before = {name: x.clone() for name, x in average.module.named_parameters()}
    with torch.no_grad():
        model.head.weight += 1
        model.after.bias += 2
    average.update(model)
    for name, x in average.module.named_parameters():
        assert torch.allclose(x, 0.9 * before[name] + 0.1 * dict(model.named_parameters())[name], atol=1e-6)
    assert average.module.loss.prototypes is None


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_timm_averages(name):
    utils = pytest.importorskip("timm.utils")
    model, arguments = trained("episode")
    average = getattr(utils, name)(model, decay=0.9)
    model.loss.set_prototypes(None)
    with torch.no_grad():
        model.head.weight += 1
    average.update(model)
    assert torch.allclose(average.module.head.weight, model.head.weight - 0.9, atol=1e-6)
    average.module(unit(11, 5, 3, torch.float32), **arguments)


def test_swa_averages_the_weights():
    model, arguments = trained("episode")
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert after(average, arguments) == after(model, arguments)


def test_accelerate_saves_the_model(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, arguments = trained("episode")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    other = Model()
    accelerate.load_checkpoint_in_model(other, str(tmp_path))
    assert after(other, arguments) == after(model, arguments)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", SOURCES)
def test_copies(kind, copied):
    model, arguments = trained(kind)
    assert after(copied(model), arguments) == after(model, arguments)
    buffer = io.BytesIO()
    torch.save(model, buffer)


def test_a_process_group_is_not_pickled():
    """A loss with a group of its own can be sent to another process, which has no such group: the default one is taken."""
    code = (
        "import os, pickle, sys, tempfile, torch.distributed as dist\n"
        "from protoclip_losses import InfoNCE, ProtoLoss\n"
        "meet = tempfile.mkdtemp()\n"
        "dist.init_process_group('gloo', init_method=f'file://{meet}/rendezvous', rank=0, world_size=1)\n"
        "for kind in (InfoNCE, ProtoLoss):\n"
        "    loss = kind(process_group=dist.new_group([0]))\n"
        "    try: pickle.dumps(loss)\n"
        "    except TypeError as error: print(error)\n"
        "sys.stdout.flush(); os._exit(0)"
    )
    lines = in_new_process(code).splitlines()
    assert len(lines) == 2
    assert all("process_group" in line and "process_group=None" in line for line in lines)


def test_a_checkpoint_from_before_the_loss_loads():
    state = {name: x for name, x in Model().state_dict().items() if "loss" not in name}
    model, arguments = trained("episode")
    wanted = after(model, arguments)
    model.load_state_dict(state)
    assert after(model, arguments) == wanted


def test_states_of_back_translation():
    pbt = PrototypicalBackTranslation(3)
    pbt.update(torch.tensor([0, 2]), unit(2, 4))
    other = PrototypicalBackTranslation(3)
    other.load_state_dict(pbt.state_dict())
    assert torch.equal(other.compute(), pbt.compute())


def test_a_packed_state_is_read_by_name_and_keeps_what_it_holds():
    state = {"a": torch.arange(3), "b": {("x", "y"): [1, "two", None]}}
    packed = pack(state)
    assert packed.dtype == torch.uint8
    assert packed["b"] == state["b"]
    assert torch.equal(unpack(packed.clone())["a"], state["a"])
    assert unpack(state) == state
    for wrong in (torch.ones(3), 7):
        with pytest.raises(TypeError, match="_extra_state must be a uint8 tensor or a mapping"):
            unpack(wrong)


def test_gradients_are_as_before_with_the_state_in_between():
    model, arguments = trained("episode")
    x = leaf(unit(11, 5, 3, torch.float32))
    model.state_dict()
    model(x, **arguments).backward()
    assert x.grad.norm() > 0
