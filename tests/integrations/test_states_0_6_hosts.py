"""States that 0.6.0 saved beside a host's own checkpoint; see tests/states_0_6/make_states.py."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from states_0_6.objects import next_steps, online, online_loss
from states_0_6.saved import FOLDER, assert_facts, read

from protoclip_losses import ProtoLoss
from protoclip_losses.integrations.open_clip.online import load_state

pytestmark = pytest.mark.usefixtures("lost_centroids_stay")


def test_open_clips_online_state(tmp_path):
    shutil.copy(FOLDER / "host_open_clip_online.pt", tmp_path / "epoch_1.online_0_of_1")
    loss = online_loss()
    load_state(loss, 1, SimpleNamespace(resume=str(tmp_path / "epoch_1.pt"), rank=0, world_size=1))
    assert_facts(next_steps(loss), read("host_open_clip_online.facts"))
    other = ProtoLoss()
    other.set_prototypes(online(every=4))
    with pytest.raises(ValueError, match="every"):
        load_state(other, 1, SimpleNamespace(resume=str(tmp_path / "epoch_1.pt"), rank=0, world_size=1))


def test_lightnings_callback():
    pytest.importorskip("lightning")
    from protoclip_losses.integrations.lightning import ProtoCLIPCallback

    callback = ProtoCLIPCallback(4)
    callback.load_state_dict(read("host_lightning"))
    assert callback.epoch == read("host_lightning.facts")["epoch"]
    module = SimpleNamespace(loss=ProtoLoss())
    callback.build = lambda trainer, module: pytest.fail("the epoch that was saved has its prototypes")
    callback.on_train_batch_start(SimpleNamespace(current_epoch=3), module, None, 0)
    with pytest.raises(RuntimeError, match="prototypes are not set"):
        module.loss(torch.eye(2), torch.eye(2), 1.0)


@pytest.mark.parametrize("online", [False, True])
def test_the_file_in_a_checkpoint_of_transformers(tmp_path, online):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from states_0_6.small_trainer import facts, trainer

    name, file = ("host_transformers_online", "proto_loss_0_of_1.pt") if online else ("host_transformers", "proto_loss.pt")
    run = trainer(tmp_path, online)
    run.save_model(str(tmp_path / "checkpoint"))
    shutil.copy(FOLDER / f"{name}.pt", tmp_path / "checkpoint" / file)
    run._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert run.is_restored
    assert_facts(facts(run.loss), read(f"{name}.facts"))
    if not online:
        run.clusterer.build = lambda *_: pytest.fail("the epoch that was saved has its prototypes")
        run.start_epoch(1, is_resumed=True)
