"""open_clip's own trainer on real pictures: what it does unmodified, and what it does with ProtoLoss in its loss's place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("pandas")  # open_clip's training code needs more than open_clip does
import open_clip
from cases import assert_near
from open_clip_runs import (
    BATCH,
    HEADS,
    ROWS,
    STILL,
    arguments,
    assert_same,
    assert_same_end,
    checkpoint,
    csv,
    log,
    logged,
    train,
    webdataset,
)
from open_clip_step import one_step, triples
from open_clip_train import main as host
from open_clip_train.params import parse_args

from protoclip_losses import ProjectionHeads, ProtoLoss
from protoclip_losses.integrations.open_clip import Launcher, add_heads, join_heads, main, parse_arguments
from protoclip_losses.integrations.open_clip.data import IndexedBatches

COMMAND = Path(__file__).parents[2] / "examples" / "host_open_clip.sh"
pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--precision", "amp", "--grad-clip-norm", "1.0"],
        ["--precision", "amp_bf16"],
        ["--accum-freq", "3"],
        ["--siglip", "--force-custom-text"],
        ["--lock-image"],
        ["--lock-text", "--lock-text-freeze-layer-norm", "--grad-checkpointing"],
        ["--distill-model", "tiny", "--distill-pretrained", "itself"],
    ],
    ids=" ".join,
)
def test_weight_zero_ends_in_the_checkpoint_of_an_unmodified_run_bit_for_bit(tmp_path, table, more):
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "teacher.pt")
    more = [tmp_path / "teacher.pt" if word == "itself" else word for word in more]
    train(host.main, tmp_path, "theirs", *csv(table, *more))
    train(main, tmp_path, "ours", "--proto-weight", 0, *HEADS, *csv(table, *more))
    theirs, ours = (checkpoint(tmp_path, name, 2) for name in ("theirs", "ours"))
    assert ours.pop("protoclip")["heads"].keys() == ProjectionHeads(32).state_dict().keys()
    assert_same({**ours, "name": "theirs"}, theirs)
    start = open_clip.create_model("tiny").state_dict()
    assert not torch.equal(start["logit_scale"], theirs["state_dict"]["logit_scale"])  # something was trained


def test_webdataset_with_accumulation_in_bfloat16(tmp_path, shards):
    flags = ["--accum-freq", 2, "--precision", "amp_bf16", "--local-loss", "--gather-with-grad", "--epochs", 2]
    train(main, tmp_path, "run", "--proto-num-prototypes", 6, *HEADS, *webdataset(shards, *flags))
    saved = checkpoint(tmp_path, "run", 2)
    heads, before = saved["protoclip"]["heads"], checkpoint(tmp_path, "run", 1)["protoclip"]["heads"]
    moved = [name for name, x in heads.items() if not torch.equal(x, before[name])]
    assert {"logit_scale_proto", "image.0.weight", "text.3.weight"} <= set(moved)
    states = join_heads(saved)["optimizer"]["state"]
    assert len(states) == sum(p.requires_grad for p in add_heads(new_model(), 8, 16).parameters())
    losses = logged(tmp_path, "run", "Proto_loss")
    half = len(losses) // 2
    assert losses[:half] == [0.0] * half  # the first epoch is warm-up
    assert all(0.5 < x < 4 for x in losses[half:])
    assert re.search(r"Episode 1: \d+ samples, 6 prototypes of each kind", log(tmp_path, "run"))


def new_model():
    torch.manual_seed(0)
    return open_clip.create_model("tiny", output_dict=True)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, shards):
    """With episodes, extraction and training see the samples of an epoch in an order that depends on seed and epoch alone."""
    common = ["--proto-num-prototypes", 6, *HEADS, *webdataset(shards, "--epochs", 3, *STILL)]
    train(main, tmp_path, "whole", *common)
    train(main, tmp_path, "rest", "--resume", tmp_path / "whole" / "checkpoints" / "epoch_1.pt", *common)
    assert_same_end(tmp_path, "rest", "whole", 3)
    assert len(logged(tmp_path, "rest", "Proto_loss")) < len(logged(tmp_path, "whole", "Proto_loss"))


ONLINE = ["--proto-online", "--proto-num-prototypes", 6, *HEADS]


def test_online_mode_takes_each_training_sample_once_and_the_data_as_they_are(tmp_path, shards):
    validation = ["--val-data", shards[0], "--val-num-samples", shards[1]]
    train(main, tmp_path, "run", *ONLINE, *webdataset(shards, "--accum-freq", 2, "--epochs", 3, *validation))
    losses = logged(tmp_path, "run", "Proto_loss")
    third = len(losses) // 3
    assert losses[:third] == [0.0] * third  # warm-up is the first epoch
    assert all(0.5 < x < 4 for x in losses[third:])
    assert "Episode" not in log(tmp_path, "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "epoch_3.online_0_of_1", weights_only=True)["prototypes"]
    steps = len(losses)
    assert (state["step"], state["calls"], state["seen"]) == (steps, 2 * steps, 2 * BATCH * steps)
    assert (state["queue_size"], state["every"], state["warmup"]) == (60, 1, steps // 3)
    assert not isinstance(numbered(tmp_path, *ONLINE, *webdataset(shards)).dataloader, IndexedBatches)


class Killed(Exception):
    pass


def test_an_online_run_killed_and_resumed_ends_where_an_uninterrupted_one_does(tmp_path, table, monkeypatch):
    original, dies = Launcher.train_one_epoch, []

    def in_an_order_of_its_own(self, model, data, loss, epoch, *rest, **more):
        """open_clip saves no state of the generator that shuffles a table."""
        if epoch in dies:
            raise Killed
        torch.manual_seed(epoch)
        original(self, model, data, loss, epoch, *rest, **more)

    monkeypatch.setattr(Launcher, "train_one_epoch", in_an_order_of_its_own)
    settings = ["--proto-queue-size", 64, "--proto-every", 2, "--proto-warmup-steps", 2, "--delete-previous-checkpoint"]
    common = [*ONLINE, *settings, *csv(table, "--epochs", 4)]
    train(main, tmp_path, "whole", *common)
    dies.append(2)
    with pytest.raises(Killed):
        train(main, tmp_path, "rest", *common)
    dies.clear()
    train(main, tmp_path, "rest", "--resume", "latest", *common)
    assert_same_end(tmp_path, "rest", "whole", 4)
    files = [f"epoch_{epoch}{kind}" for epoch, kind in ((3, ".online_0_of_1"), (4, ".online_0_of_1"), (4, ".pt"))]
    for name in ("whole", "rest"):
        assert sorted(file.name for file in (tmp_path / name / "checkpoints").iterdir()) == files
    with pytest.raises(ValueError, match="state_dict has every=2 but this OnlinePrototypes has every=3"):
        train(main, tmp_path, "rest", "--resume", "latest", *common, "--epochs", 5, "--proto-every", 3)


def test_a_checkpoint_without_a_queue_is_gone_on_with(tmp_path, table):
    train(main, tmp_path, "episodes", *HEADS, *csv(table, "--epochs", 1))
    first = tmp_path / "episodes" / "checkpoints" / "epoch_1.pt"
    train(main, tmp_path, "online", "--resume", first, *ONLINE, *csv(table, "--epochs", 2, "--proto-warmup-steps", 2))
    assert "the queue begins empty" in log(tmp_path, "online")
    assert logged(tmp_path, "online", "Proto_loss")[-1] > 0.5


def test_a_teacher_and_the_loss_of_open_clip_beside_it(tmp_path, table):
    np.save(tmp_path / "teacher.npy", np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32))
    teacher = ["--proto-teacher", f"words={tmp_path / 'teacher.npy'}", "--proto-teacher-dim", 4, "--proto-warmup-epochs", 0]
    train(main, tmp_path, "run", *teacher, "--proto-keep-loss", *HEADS, *csv(table, "--epochs", 1))
    contrastive, proto, external, total = (
        logged(tmp_path, "run", name) for name in ("Contrastive_loss", "Proto_loss", "Proto_external_loss", " Loss")
    )
    assert len(total) == ROWS // BATCH
    for parts in zip(contrastive, proto, external, total, strict=True):
        assert min(parts) > 0.1
        assert sum(parts[:3]) == pytest.approx(parts[3], rel=1e-3)


def test_a_teacher_of_a_webdataset_is_an_error(tmp_path, shards):
    np.save(tmp_path / "teacher.npy", np.zeros((5, 4), np.float32))
    teacher = ["--proto-teacher", f"words={tmp_path / 'teacher.npy'}", "--proto-teacher-dim", 2]
    with pytest.raises(ValueError, match="--proto-teacher needs --dataset-type csv"):
        train(main, tmp_path, "run", *teacher, *webdataset(shards, "--epochs", 1))
    assert host.create_loss is open_clip.create_loss  # what was replaced is put back


def test_torchcompile_gives_the_loss_of_eager(tmp_path, table):
    options = ["--proto-warmup-epochs", 0, "--proto-num-prototypes", 4, *HEADS, *csv(table, "--epochs", 1, *STILL)]
    train(main, tmp_path, "eager", *options)
    train(main, tmp_path, "compiled", "--torchcompile", *options)
    one, other = (logged(tmp_path, name, " Loss") for name in ("eager", "compiled"))
    assert len(one) == ROWS // BATCH
    assert other == pytest.approx(one, rel=1e-3)
    eager, compiled = (checkpoint(tmp_path, name, 1)["state_dict"] for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()


def numbered(folder, *data, accum_freq=1):
    """The training data as main makes them."""
    options, rest = parse_arguments(arguments(folder, "run", *HEADS, *data, "--accum-freq", accum_freq))
    args = parse_args(rest)
    args.distributed, args.world_size = False, 1
    launcher = Launcher(options)
    _, *transforms = open_clip.create_model_and_transforms("tiny")
    return launcher.get_data(args, tuple(transforms), epoch=0, tokenizer=open_clip.get_tokenizer("tiny"))["train"]


@pytest.mark.parametrize("more", [[], ["--dataset-resampled"]], ids=["each shard once", "resampled"])
def test_extraction_sees_the_samples_of_a_webdataset_that_training_sees(tmp_path, shards, more):
    train = numbered(tmp_path, *webdataset(shards, *more))
    seen = []
    for epoch in range(2):
        train.set_epoch(epoch)
        extraction = [
            (int(i), text) for _, texts, index in train.dataloader.extraction for i, text in zip(index, texts, strict=True)
        ]
        training = [i for _ in train.dataloader for i in train.dataloader.index().tolist()]
        assert training == [i for i, _ in extraction]
        seen.append(dict(extraction))
    assert len(training) == BATCH * train.dataloader.num_batches
    assert seen[0].keys() != seen[1].keys() or list(seen[0]) != list(seen[1])
    for i in seen[0].keys() & seen[1].keys():
        assert torch.equal(seen[0][i], seen[1][i])  # a number is one sample's, whatever the epoch
    assert len({tuple(text.tolist()) for text in seen[0].values()}) > len(seen[0]) // 2


def test_extraction_sees_every_row_of_a_table_and_training_knows_their_numbers(tmp_path, table):
    rows = [line.split("\t")[1] for line in table.read_text().splitlines()[1:]]
    train = numbered(tmp_path, *csv(table, "--batch-size", 9), accum_freq=2)
    tokenize = open_clip.get_tokenizer("tiny")
    assert [int(i) for batch in train.dataloader.extraction for i in batch[2]] == list(range(ROWS))
    recent = []
    for _, texts in train.dataloader:
        recent = [*recent, texts][-2:]
        own = train.dataloader.index()
        assert torch.equal(tokenize([rows[i] for i in own]), torch.cat(recent))
    assert len(own) == 18


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """But for open_clip's own scale, which gets one gradient per call of the loss, as it does without us."""
    one, two = ({n: p.grad for n, p in one_step(tmp_path, triples(16), accum_freq).named_parameters()} for accum_freq in (1, 2))
    for name in one:
        wanted = 2 * one[name] if name == "logit_scale" else one[name]
        assert_near(two[name], wanted, 1e-5)
        assert wanted.norm() > 0 or name == "token_embedding.weight", name


@pytest.mark.slow
def test_the_command_of_the_documentation(tmp_path, shards):
    environment = {
        **os.environ,
        "SHARDS": shards[0],
        "SAMPLES": "64",
        "MODEL": "ViT-S-32-alt",
        "BATCH": "16",
        "OMP_NUM_THREADS": "2",
    }
    small = [
        "--workers",
        "1",
        "--force-image-size",
        "32",
        "--logs",
        tmp_path,
        "--name",
        "run",
        "--device",
        "cpu",
        "--proto-num-prototypes",
        "4",
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        ["bash", COMMAND, *map(str, small)], capture_output=True, text=True, timeout=250, env={**environment, "PATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = logged(tmp_path, "run", "Proto_loss")
    assert losses[0] == 0
    assert losses[-1] > 0.1
    assert "text.0.weight" in checkpoint(tmp_path, "run", 2)["protoclip"]["heads"]


def test_the_scale_is_clamped_after_each_step(tmp_path):
    model = one_step(tmp_path, triples(16), log_scale=7.0)
    assert float(model.proto.logit_scale_proto.detach()) == np.float32(np.log(100))


def test_what_cannot_work_is_refused():
    for flags in (["--trace"], ["--torchscript"], ["--horovod"], ["--model", "coca_ViT-B-32"], ["--proto-wieght", "1"]):
        with pytest.raises(SystemExit):
            parse_arguments(["--model", "tiny", *flags])
    for teacher in (["file.npy"], ["words", "--proto-teacher", "words=file.npy"]):
        with pytest.raises(SystemExit):
            parse_arguments(["--model", "tiny", "--proto-teacher", *teacher])
    for wrong, name in (
        (torch.nn.Linear(2, 2), "Linear"),
        (torch.compile(new_model()), "OptimizedModule"),
        (add_heads(new_model(), 8, 16), "CLIP with heads"),
    ):
        with pytest.raises(TypeError, match=f"model must be open_clip's CLIP or CustomTextCLIP, without heads .* got {name}$"):
            add_heads(wrong)


def test_the_model_stays_what_it_was():
    model = new_model()
    images, texts = torch.randn(3, 3, 32, 32), torch.randint(1, 400, (3, 16))
    before, names = model(images, texts), set(model.state_dict())
    add_heads(model, 8, 16)
    after = model(images, texts)
    assert isinstance(model, open_clip.CLIP)
    assert type(model).__name__ == "CLIP"
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert {name for name in model.state_dict() if not name.startswith("proto.")} == names
    assert after["image_features_projected"].shape == (3, 8)
    assert model(images)["text_features"] is None
    loss = ProtoLoss()
    loss.set_prototypes(None)
    assert loss(**after).shape == ()  # as a loss of open_clip's CLIPTask is called
