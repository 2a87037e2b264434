"""Models with heads and losses in the hands of Trainer and Lightning: pickled, saved, and given a batch of one row."""

import copy
import pickle

import pytest
import torch
from host_pairs import PicturePairs
from torch.utils.data import DataLoader

from protoclip_losses import ProtoLoss, WithIndex

ROWS = 21
BATCH_NORM = {"dim": 8, "hidden_dim": 16}


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


def test_the_last_batch_of_trainer_is_one_row(tmp_path, pairs):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from hf_trainer import Recorded, trainer

    loss = Recorded()
    trainer(tmp_path, pairs, loss=loss, heads=BATCH_NORM, arguments={"per_device_train_batch_size": 10}).train()
    assert [len(index) for index, _ in loss.calls] == [10, 10, 1] * 2


def test_the_last_batch_of_lightning_is_one_row(tmp_path, pairs):
    pytest.importorskip("lightning")
    from host_lightning import Clip
    from lightning_fit import fit

    from protoclip_losses import ProjectionHeads
    from protoclip_losses.integrations.lightning import ProtoCLIPCallback

    model = Clip()
    model.proto = ProjectionHeads(64, 32, hidden_dim=16)
    _, seen = fit(tmp_path, DataLoader(WithIndex(pairs), 10), ProtoCLIPCallback(4), model)
    assert [len(index) for index, _ in seen.calls] == [10, 10, 1] * 2


def test_a_trained_model_is_pickled_and_copied(tmp_path, pairs):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from hf_trainer import trainer

    model = trainer(tmp_path, pairs)
    model.train()
    model = model.model
    torch.save(model, tmp_path / "whole.pt")
    batch = next(iter(DataLoader(pairs, 5)))
    for other in (torch.load(tmp_path / "whole.pt", weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        with torch.no_grad():
            one, two = model.eval().features(**batch), other.eval().features(**batch)
        assert all(torch.equal(x, two[name]) for name, x in one.items())


def test_a_loss_inside_the_model_is_saved_by_trainer_and_accelerate(tmp_path, pairs):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from hf_trainer import trainer
    from transformers import CLIPModel

    loss = ProtoLoss()
    run = trainer(tmp_path, pairs, loss=loss)
    run.model.loss = loss
    run.train()
    read = CLIPModel.from_pretrained(tmp_path / "checkpoint-3")
    assert read.logit_scale.shape == ()
    Accelerator(cpu=True).save_model(run.model, tmp_path / "accelerate")
    assert [*(tmp_path / "accelerate").glob("*.safetensors")]
