"""ProtoCLIPTrainer: resumed under other conditions, new models, evaluation alone."""

import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hf_trainer import Recorded, trainer
from host_pairs import PicturePairs
from host_transformers import small_model
from transformers import CLIPModel, Trainer, TrainerCallback, default_data_collator

from protoclip_losses import EpisodicClusterer, OnlinePrototypes, ProtoLoss
from protoclip_losses.integrations.transformers import add_heads, load_heads

ROWS = 44


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


def with_loss(items):
    return {**default_data_collator(items), "return_loss": True}


class Counting(EpisodicClusterer):
    """Counts its builds."""

    builds = 0

    def build(self, *args):
        self.builds += 1
        return super().build(*args)


def killed(folder, step, pairs, **options):
    """A folder with the checkpoint of one step of a run, for another run to resume."""
    trainer(folder / "whole", pairs, **options).train()
    (folder / "rest").mkdir()
    shutil.copytree(folder / "whole" / f"checkpoint-{step}", folder / "rest" / f"checkpoint-{step}")
    return folder / "rest"


@pytest.mark.parametrize(("batch", "epoch", "builds"), [(5, 0, 3), (10, 1, 2), (20, 3, 1), (11, 1, 2)])
def test_a_run_resumed_with_another_batch_size_has_the_prototypes_of_its_episode(tmp_path, pairs, batch, epoch, builds):
    """Step 3 of batches of 10 is in the middle of epoch 1; Trainer takes it for another place with another batch size."""
    options = {"episode_size": 20, "warmup_epochs": 0}
    folder = killed(tmp_path, 3, pairs, arguments={"per_device_train_batch_size": 10}, **options)
    arguments = {"per_device_train_batch_size": batch, "num_train_epochs": epoch + builds, "save_steps": 100}
    run = trainer(folder, pairs, loss=Recorded(), clusterer=Counting(4), arguments=arguments, **options)
    run.train(resume_from_checkpoint=True)
    drawn = run.order.episodes.episode(epoch).index.tolist()
    steps = -(-20 // batch)
    skipped = 3 % steps * batch
    assert run.loss.samples[: 20 - skipped] == drawn[skipped:]
    assert all(parts["proto_loss"] > 0.3 for _, parts in run.loss.calls)
    assert run.clusterer.builds == builds - (batch in (10, 11))  # the episode of the checkpoint is the same: 2 steps in each


def test_an_epoch_that_a_callback_ends_early_is_followed_by_the_next_episode(tmp_path, pairs):
    class Half(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            control.should_epoch_stop = True

    options = {"episode_size": 22, "warmup_epochs": 0, "loss": Recorded(), "callbacks": [Half()]}
    run = trainer(tmp_path, pairs, arguments={"save_steps": 100}, **options)
    run.train()
    episodes = [run.order.episodes.episode(number).index.tolist() for number in (0, 1)]
    assert [index for index, _ in run.loss.calls] == [episodes[0][:11], episodes[1][:11]]


def test_a_resumed_run_clusters_from_where_it_was(tmp_path, pairs):
    """A warm start needs the last centroids: those of the epoch that was saved."""

    def options():
        return {
            "arguments": {"num_train_epochs": 4, "save_steps": 10},
            "clusterer": EpisodicClusterer(4, warm_start=True, niter=1),
        }

    folder = killed(tmp_path, 10, pairs, **options())
    rest, whole = trainer(folder, pairs, **options()), trainer(tmp_path / "again", pairs, **options())
    whole.train()
    rest.train(resume_from_checkpoint=True)
    assert rest.clusterer.previous.report.drift == whole.clusterer.previous.report.drift
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, rest.model.state_dict()[name]), name


def test_a_second_run_does_not_take_the_first_for_resumed(tmp_path, pairs):
    folder = killed(tmp_path, 6, pairs)
    (tmp_path / "without").mkdir()
    shutil.copytree(folder / "checkpoint-6", tmp_path / "without" / "checkpoint-6")
    (tmp_path / "without" / "checkpoint-6" / "proto_loss.pt").unlink()
    run = trainer(folder, pairs, clusterer=Counting(4), arguments={"save_steps": 100})
    run.train(resume_from_checkpoint=True)
    assert run.is_restored
    assert run.clusterer.builds == 0
    run.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-6"))
    assert not run.is_restored
    assert run.clusterer.builds == 1


def test_a_checkpoint_of_a_plain_trainer(tmp_path, pairs):
    """It has no heads, so that the state of its optimizer does not fit; its weights do."""
    plain = {"data_collator": with_loss, "arguments": {"num_train_epochs": 1, "save_steps": 2}}
    trainer(tmp_path / "plain", pairs, Trainer, **plain).train()
    run = trainer(tmp_path / "plain", pairs)
    with pytest.raises(
        ValueError, match=r"checkpoint-4 must be a checkpoint of ProtoCLIPTrainer, .*from_pretrained\('.*checkpoint-4'\)"
    ):
        run.train(resume_from_checkpoint=True)
    plain["arguments"]["save_only_model"] = True
    trainer(tmp_path / "weights", pairs, Trainer, **plain).train()
    run = trainer(tmp_path / "weights", pairs, loss=Recorded(), arguments={"save_steps": 100})
    run.train(resume_from_checkpoint=True)
    assert not run.is_restored
    assert [parts["proto_loss"] > 0.3 for _, parts in run.loss.calls] == [True] * 4


def test_heads_are_read_with_the_model_they_were_saved_with(tmp_path, pairs):
    for norm, shards in (("layer", "1GB"), ("batch", "20KB")):
        model = trainer(tmp_path, pairs, heads={"dim": 6, "hidden_dim": 12, "norm": norm}, arguments={"save_steps": 100})
        model.train()
        model.model.save_pretrained(tmp_path / norm, max_shard_size=shards)
        read = load_heads(CLIPModel.from_pretrained(tmp_path / norm), tmp_path / norm)
        saved = model.model.state_dict()
        assert read.state_dict().keys() == saved.keys()
        assert all(torch.equal(x, saved[name]) for name, x in read.state_dict().items())
        assert trainer(tmp_path, pairs, model=read).model is read
    CLIPModel.from_pretrained(tmp_path / "layer").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain must hold a model that was saved with heads, got none under 'proto\.'"):
        load_heads(small_model(), tmp_path / "plain")


def test_an_online_run_does_not_resume_with_other_settings_or_in_silence_without_a_queue(tmp_path, pairs):
    def online(every):
        loss = ProtoLoss()
        loss.set_prototypes(OnlinePrototypes(4, queue_size=22, every=every, warmup=3))
        return loss

    folder = killed(tmp_path, 6, pairs, loss=online(2))
    with pytest.raises(ValueError, match="every=2 but this OnlinePrototypes has every=4"):
        trainer(folder, pairs, loss=online(4)).train(resume_from_checkpoint=True)
    (folder / "checkpoint-6" / "proto_loss_0_of_1.pt").rename(folder / "checkpoint-6" / "proto_loss_0_of_2.pt")
    run = trainer(folder, pairs, loss=online(2))
    with pytest.warns(UserWarning, match=r"no proto_loss_0_of_1.pt on process\(es\) \[0\] of 1: each begins with an empty queue"):
        run.train(resume_from_checkpoint=True)
    assert run.loss.prototypes.step == 2


@pytest.mark.parametrize("online", [False, True])
def test_each_model_of_model_init_starts_anew(tmp_path, pairs, online):
    loss = Recorded()
    if online:
        loss = ProtoLoss()
        loss.set_prototypes(OnlinePrototypes(4, queue_size=22, every=2, warmup=3))
    models = []

    def model_init():
        models.append(small_model())
        return models[-1]

    arguments = {"save_steps": 100}
    run = trainer(tmp_path, pairs, model=None, model_init=model_init, loss=loss, arguments=arguments)
    ends = []
    for _ in range(2):
        run.train()
        ends.append({name: x.clone() for name, x in run.model.state_dict().items()})
        assert run.clusterer.previous is None or not run.clusterer.previous.report.drift
        assert loss.prototypes.step == 8 if online else True
    assert run.model is models[-1]
    assert len(models) == 3  # one when Trainer is made
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    if not online:
        assert loss.calls[:8] == loss.calls[8:]
    torch.manual_seed(run.args.seed)
    once = trainer(tmp_path, pairs, model=add_heads(small_model(), dim=8, hidden_dim=16, norm="layer"), arguments=arguments)
    assert once.model.state_dict().keys() == ends[0].keys()


def test_evaluation_needs_no_training_set(tmp_path, pairs):
    run = trainer(tmp_path, None, eval_dataset=pairs, data_collator=with_loss)
    plain = trainer(tmp_path, None, Trainer, eval_dataset=pairs, data_collator=with_loss)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    run = trainer(tmp_path, None, model=None, model_init=small_model, eval_dataset=pairs, data_collator=with_loss)
    assert run.predict(pairs).metrics["test_loss"] == plain.predict(pairs).metrics["test_loss"]
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        run.train()
