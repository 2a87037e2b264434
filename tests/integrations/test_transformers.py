"""transformers' own Trainer on real pictures, in one process and in two."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from cases import assert_near
from hf_trainer import Recorded, trainer, weights
from host_pairs import PicturePairs
from host_transformers import small_model
from transformers import CLIPModel, Trainer, default_data_collator

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss, TeacherAdapter
from protoclip_losses.integrations.transformers import add_heads

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 44


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


def assert_same_weights(one, other, tolerance=None):
    assert one.keys() == other.keys()
    for name in one:
        if tolerance is None:
            assert torch.equal(one[name], other[name]), name
        else:
            assert_near(one[name], other[name], tolerance)


def test_the_first_epoch_is_warm_up_and_the_next_has_prototypes(tmp_path, pairs):
    loss = Recorded()
    run = trainer(tmp_path, pairs, loss=loss)
    before = {name: x.detach().clone() for name, x in run.model.named_parameters()}
    run.train()
    assert [parts["proto_loss"] > 0.3 for _, parts in loss.calls] == [False] * 4 + [True] * 4
    for epoch in (loss.calls[:4], loss.calls[4:]):
        assert sorted(i for index, _ in epoch for i in index) == list(range(ROWS))
    assert loss.calls[0][0] != loss.calls[4][0]
    still = [name for name, x in run.model.named_parameters() if torch.equal(x, before[name])]
    assert not still
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(parts.values()) for _, parts in loss.calls], abs=1e-3)


def test_a_run_killed_in_the_middle_of_an_epoch_ends_where_an_uninterrupted_one_does(tmp_path, pairs):
    whole = trainer(tmp_path / "whole", pairs, arguments={"num_train_epochs": 3})
    whole.train()
    whole.save_model(tmp_path / "end")
    (tmp_path / "rest").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "rest" / "checkpoint-6")  # 2 of epoch 1's 4 steps
    rest = trainer(tmp_path / "rest", pairs, arguments={"num_train_epochs": 3}, loss=Recorded())
    rest.train(resume_from_checkpoint=True)
    assert len(rest.loss.calls) == 6
    rest.save_model(tmp_path / "other end")
    assert_same_weights(weights(tmp_path / "other end"), weights(tmp_path / "end"))


def online_loss():
    loss = ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(4, queue_size=22, every=2, warmup=3))
    return loss


def test_an_online_run_killed_and_resumed_ends_where_an_uninterrupted_one_does(tmp_path, pairs):
    teacher = TeacherAdapter.from_tensor(torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0)))
    options = {"arguments": {"num_train_epochs": 3}, "teachers": {"words": teacher}}
    whole = trainer(tmp_path / "whole", pairs, loss=online_loss(), **options)
    whole.train()
    whole.save_model(tmp_path / "end")
    assert whole.loss.prototypes.step == 12
    assert {("image", "words"), ("text", "image")} <= whole.loss.prototypes.terms.keys()
    (tmp_path / "rest").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "rest" / "checkpoint-6")
    rest = trainer(tmp_path / "rest", pairs, loss=online_loss(), **options)
    rest.train(resume_from_checkpoint=True)
    rest.save_model(tmp_path / "other end")
    assert rest.loss.prototypes.step == 12
    assert_same_weights(weights(tmp_path / "other end"), weights(tmp_path / "end"))


def test_a_checkpoint_of_a_plain_trainer_is_gone_on_with(tmp_path, pairs):
    trainer(tmp_path, pairs, Trainer, data_collator=with_loss, arguments={"num_train_epochs": 1, "save_steps": 2}).train()
    rest = trainer(tmp_path, pairs, loss=Recorded(), warmup_epochs=0, arguments={"save_steps": 100})
    rest._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    plain = weights(tmp_path / "checkpoint-2")
    assert all(torch.equal(x, plain[name]) for name, x in rest.model.state_dict().items() if not name.startswith("proto."))
    assert not rest.is_restored


def with_loss(items):
    """A collator as run_clip.py of transformers' examples has it: it picks its columns and knows of no index."""
    names = ("pixel_values", "input_ids", "attention_mask")
    return {**{name: torch.stack([item[name] for item in items]) for name in names}, "return_loss": True}


@pytest.mark.parametrize("keep", [True, False])
def test_a_collator_that_picks_its_columns(tmp_path, pairs, keep):
    arguments = {"num_train_epochs": 1, "remove_unused_columns": keep}
    loss = Recorded()
    trainer(tmp_path, pairs, data_collator=with_loss, arguments=arguments, loss=loss, warmup_epochs=0).train()
    assert sorted(i for index, _ in loss.calls for i in index) == list(range(ROWS))


def test_evaluation_is_the_models_own(tmp_path, pairs):
    run = trainer(tmp_path, pairs, eval_dataset=pairs, data_collator=with_loss)
    plain = trainer(tmp_path, pairs, Trainer, eval_dataset=pairs, data_collator=with_loss)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_what_is_saved_is_a_clip_model(tmp_path, pairs):
    run = trainer(tmp_path, pairs)
    run.save_model()
    read = CLIPModel.from_pretrained(tmp_path)
    state = run.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in read.state_dict().items())
    batch = default_data_collator([pairs[i] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(read(**batch).logits_per_image, run.model.eval()(**batch).logits_per_image)


def test_the_loss_of_the_model_and_ours_without_prototypes(pairs):
    model = small_model().train()
    batch = default_data_collator([pairs[i] for i in range(8)])
    wanted = model(**batch, return_loss=True).loss
    assert_near(
        InfoNCE()(**{k: v for k, v in add_heads(model, 8, 16)(**batch).items() if "proj" not in k and "proto" not in k}),
        wanted,
        1e-5,
    )


def test_episodes_smaller_than_the_data_with_a_teacher_and_accumulation(tmp_path, pairs):
    loss = Recorded()
    teacher = TeacherAdapter.from_tensor(torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0)))
    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "num_train_epochs": 2}
    options = {"episode_size": 20, "warmup_epochs": 0, "teachers": {"words": teacher}}
    run = trainer(tmp_path, pairs, loss=loss, arguments=arguments, **options)
    run.train()
    assert run.state.global_step == 4
    episodes = [sorted(i for index, _ in loss.calls[part] for i in index) for part in (slice(4), slice(4, 8))]
    assert [len(set(episode)) for episode in episodes] == [20, 20]
    assert episodes[0] != episodes[1]
    assert all(parts["proto_external_loss"] > 0.3 for _, parts in loss.calls)
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    totals = [sum(parts.values()) for _, parts in loss.calls]
    assert logged == pytest.approx([(totals[i] + totals[i + 1]) / 2 for i in range(0, 8, 2)], abs=1e-3)


def test_the_scale_is_clamped_after_a_step(tmp_path, pairs):
    run = trainer(tmp_path, pairs, arguments={"max_steps": 1})
    run.model.proto.logit_scale_proto.data.fill_(7.0)
    run.train()
    assert float(run.model.proto.logit_scale_proto.detach().exp()) == pytest.approx(100)


def test_what_cannot_work_is_an_error(tmp_path, pairs):
    with pytest.raises(TypeError, match=r"model must be a dual encoder such as CLIPModel, .* got Linear without"):
        add_heads(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="train_dataset must have a length and be read by number, got generator"):
        trainer(tmp_path, (x for x in pairs))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_end_where_one_does(tmp_path):
    """The example, by torchrun: InfoNCE over both processes' rows, episodes and K-means over both."""
    common = ["--rows", "48", "--epochs", "2", "--save-steps", "100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, launch, batch in (
        ("one", [sys.executable], 16),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], 8),
    ):
        script = [EXAMPLES / "host_transformers.py", "--output", tmp_path / name, "--batch-size", batch, *common]
        done = subprocess.run([*launch, *map(str, script)], capture_output=True, text=True, timeout=280, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    # A key's bias has no effect and no gradient: what Adam makes of its rounding is not compared.
    one, two = ({k: x for k, x in weights(tmp_path / n).items() if "k_proj.bias" not in k} for n in ("one", "two"))
    assert_same_weights(two, one, 1e-5)
