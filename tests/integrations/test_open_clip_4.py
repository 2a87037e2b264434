"""open_clip 4.x's task, training step and checkpoints with prototypes, on real pictures.

4.x is not released: this file is collected where it is installed, see conftest.py.
"""

import math

import open_clip
import pytest
import torch
from cases import assert_near
from open_clip.task import CLIPTask, load_checkpoint, save_checkpoint
from open_clip_step import add_tiny_model, triples
from open_clip_train.train import _train_step_eager

from protoclip_losses import EpisodicClusterer, OnlinePrototypes, ProtoLoss, TeacherAdapter, extract
from protoclip_losses.integrations.open_clip import add_heads, join_heads, parameter_names, prototype_task, separate_heads

ROWS, BATCH = 48, 12


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    add_tiny_model(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def data():
    return triples(ROWS)


@pytest.fixture(scope="module")
def words():
    from pair_files import emoji_with_groups

    return TeacherAdapter.from_captions([emoji_with_groups()[0].captions[i] for i in range(ROWS)], dim=8)


def batches(data, size=BATCH, index=True):
    for i in range(0, ROWS, size):
        image, text, number = data[i : i + size]
        yield {"image": image, "text": text, **({"index": number} if index else {})}


def new_model():
    torch.manual_seed(0)
    return add_heads(open_clip.create_model("tiny", output_dict=True), 8, 16, "layer")


def new_task(teachers=None, prototypes=None, **settings):
    loss = ProtoLoss(target_temperature=0.1, **settings)
    loss.set_prototypes(prototypes)
    task = prototype_task(new_model(), loss, teachers, verbose=False)
    task.train()
    return task, torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)


class Arguments:
    def __init__(self, accum_freq=1):
        self.accum_freq, self.grad_clip_norm, self.horovod = accum_freq, None, False


def train(task, optimizer, batches, accum_freq=1):
    """The losses of each step, by open_clip's own."""
    from contextlib import nullcontext

    state, steps = ([], {}), []
    for batch in batches:
        batch = task.prepare_batch(batch, torch.device("cpu"), torch.float32)
        result = _train_step_eager(task, batch, state, optimizer, None, nullcontext, Arguments(accum_freq))
        if result is not None:
            losses, report, _, state = result
            assert all(isinstance(x, torch.Tensor) for x in (*losses.values(), *report.values()))
            steps.append({name: float(x.detach()) for name, x in losses.items()})
    return steps


def project(task):
    def function(batch):
        out = task.trainable_module(image=batch["image"], text=batch["text"])
        return batch["index"], out["image_features_projected"], out["text_features_projected"]

    return function


def test_without_prototypes_it_is_open_clips_task(data):
    task, optimizer = new_task()
    plain = CLIPTask(open_clip.create_model("tiny", output_dict=True), verbose=False)
    plain.trainable_module.load_state_dict(task.trainable_module.state_dict(), strict=False)
    plain.train()
    other = torch.optim.AdamW(plain.trainable_module.parameters(), lr=1e-3)
    assert isinstance(task, CLIPTask)
    for ours, theirs in zip(train(task, optimizer, batches(data)), train(plain, other, batches(data, index=False)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["contrastive_loss"] == pytest.approx(theirs["contrastive_loss"], rel=1e-5)


def test_an_episode_with_words(data, words):
    task, optimizer = new_task()
    clusterer = EpisodicClusterer(6)
    clusters = clusterer.fit_teacher(words)
    bank = extract(task.trainable_module, list(batches(data)), project(task))
    task.loss.set_prototypes(clusterer.build(bank, {"words": clusters}))
    losses = [step for _ in range(8) for step in train(task, optimizer, batches(data))]
    for name in ("proto_loss", "proto_external_loss", "contrastive_loss"):
        assert losses[-1][name] < losses[0][name]
    assert losses[-1]["loss"] == pytest.approx(sum(x for name, x in losses[-1].items() if name.endswith("_loss")), rel=1e-6)


@pytest.mark.parametrize("with_words", [False, True], ids=["alone", "words"])
def test_online(data, words, with_words):
    teachers = {"words": words} if with_words else {}
    task, optimizer = new_task(teachers, OnlinePrototypes(6, queue_size=ROWS, every=2, warmup=2))
    losses = [x for _ in range(6) for x in train(task, optimizer, batches(data, index=with_words))]
    assert losses[1]["proto_loss"] == 0 < losses[3]["proto_loss"]
    assert losses[-1]["proto_loss"] < losses[3]["proto_loss"]
    assert (losses[-1]["proto_external_loss"] > 0) == with_words
    assert task.loss.prototypes.step == 24


def test_accumulation_has_the_gradients_of_the_whole_batch(data, words):
    """Of everything but logit_scale, whose gradient is as many times as large, as with open_clip's own loss."""
    gradients = []
    for accum_freq in (1, 4):
        task, _ = new_task()
        clusterer = EpisodicClusterer(6)
        bank = extract(task.trainable_module, list(batches(data)), project(task))
        prototypes = clusterer.build(bank, {"words": clusterer.fit_teacher(words)})
        prototypes.calls_per_step = accum_freq
        task.loss.set_prototypes(prototypes)
        train(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.0), batches(data, ROWS // accum_freq), accum_freq)
        gradients.append({name: p.grad for name, p in task.trainable_module.named_parameters()})
    for name, whole in gradients[0].items():
        assert_near(gradients[1][name], whole * (accum_freq if name == "logit_scale" else 1), 1e-4)


def test_both_scales_are_clamped(data):
    task, optimizer = new_task()
    for scale in (task.trainable_module.logit_scale, task.trainable_module.proto.logit_scale_proto):
        scale.data.fill_(9.0)
    train(task, optimizer, batches(data))
    own = task.trainable_module
    assert all(4.5 < float(x.detach()) <= math.log(100) + 1e-6 for x in (own.logit_scale, own.proto.logit_scale_proto))


def test_a_checkpoint_opens_in_open_clip_and_resumes_here(data, tmp_path):
    task, optimizer = new_task(prototypes=OnlinePrototypes(6, queue_size=ROWS, every=2, warmup=2))
    task.setup_ema(decay=0.9)
    train(task, optimizer, batches(data, index=False))
    task.update_ema()
    saved = separate_heads(save_checkpoint(task, optimizer, 1), parameter_names(task.trainable_module, optimizer))
    torch.save({**saved, "prototypes": task.loss.state_dict()}, tmp_path / "epoch_1.pt")
    wanted = train(task, optimizer, batches(data, index=False))

    model = open_clip.create_model("tiny", pretrained=str(tmp_path / "epoch_1.pt"))
    entries = torch.load(tmp_path / "epoch_1.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(x, entries[name]) for name, x in model.state_dict().items())
    plain = CLIPTask(open_clip.create_model("tiny", output_dict=True), verbose=False).setup_ema()
    other = torch.optim.AdamW(plain.trainable_module.parameters(), lr=1e-3)
    assert load_checkpoint(plain, str(tmp_path / "epoch_1.pt"), other) == 1

    resumed, its_optimizer = new_task(prototypes=OnlinePrototypes(6, queue_size=ROWS, every=2, warmup=2))
    resumed.setup_ema()
    checkpoint = join_heads(torch.load(tmp_path / "epoch_1.pt", weights_only=True))
    resumed.load_state_dict({name: checkpoint[name] for name in ("state_dict", "state_dict_ema")})
    its_optimizer.load_state_dict(checkpoint["optimizer"])
    resumed.loss.load_state_dict(checkpoint["prototypes"])
    assert train(resumed, its_optimizer, batches(data, index=False)) == wanted
    ours, theirs = (t.get_trainable_module(use_ema=True).state_dict() for t in (resumed, task))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("proto.") for name in ours)


def test_evaluation_is_open_clips(data):
    task, _ = new_task()
    task.eval()
    with torch.no_grad():
        out = task(next(batches(data)))
    assert out["image_features"].shape == (BATCH, 32)


def test_scales_of_fsdp_are_vectors(data):
    """FSDP2 shards no scalar, and the task then makes logit_scale a vector of one."""
    task, optimizer = new_task()
    whole = train(task, optimizer, batches(data))
    other, _ = new_task()
    other.trainable_module.logit_scale = torch.nn.Parameter(other.trainable_module.logit_scale.data.unsqueeze(0))
    its_optimizer = torch.optim.AdamW(other.trainable_module.parameters(), lr=1e-3)
    for ours, theirs in zip(train(other, its_optimizer, batches(data)), whole, strict=True):
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prototype_task(open_clip.create_model("tiny"), ProtoLoss()), "model must have heads, see add_heads, got a CLIP"),
        (lambda: prototype_task(new_model(), torch.nn.Identity()), "loss must be a ProtoLoss, got Identity"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(TypeError, match=message):
        call()
