"""Lightning's own Trainer on real pictures."""

import pytest
import torch

pytest.importorskip("lightning")
from host_lightning import Clip
from host_pairs import PicturePairs
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from protoclip_losses import EpisodeSampler, OnlinePrototypes, ProtoLoss, TeacherAdapter
from protoclip_losses.episodes import EpisodeOrder, WithIndex
from protoclip_losses.integrations.lightning import ProtoCLIPCallback
from protoclip_losses.prototypes.extra_state import unpack

ROWS, BATCH = 40, 10


@pytest.fixture(scope="module")
def pairs():
    return WithIndex(PicturePairs(ROWS))


class Seen(Callback):
    """What each batch's loss was called with."""

    def __init__(self):
        self.calls = []

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.calls.append((batch["index"].tolist(), float(trainer.callback_metrics["proto_loss"])))


def fit(folder, pairs, callback, epochs=2, resume=None, order=None, model=None, **more):
    """Train; the module and what its batches saw. The order of an epoch depends on its number alone."""
    torch.manual_seed(0)
    model, seen = Clip() if model is None else model, Seen()
    order = EpisodeOrder(EpisodeSampler(ROWS, ROWS)) if order is None else order
    loader = torch.utils.data.DataLoader(pairs, BATCH, **({"shuffle": True} if order == "shuffle" else {"sampler": order}))
    saves = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, callbacks=[callback, seen, saves], default_root_dir=folder, **quiet, **more)
    trainer.fit(model, loader, ckpt_path=resume)
    return model, seen.calls


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    one.pop("loss._extra_state"), other.pop("loss._extra_state")
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("order", [None, "shuffle"])
def test_the_first_epoch_is_warm_up_and_the_next_has_prototypes(tmp_path, pairs, order):
    start = Clip().state_dict()
    model, calls = fit(tmp_path, pairs, ProtoCLIPCallback(4), order=order)
    assert [proto > 0.3 for _, proto in calls] == [False] * 4 + [True] * 4
    for epoch in (calls[:4], calls[4:]):
        assert sorted(i for index, _ in epoch for i in index) == list(range(ROWS))
    assert not torch.equal(model.proto.logit_scale_proto, start["proto.logit_scale_proto"])
    term = model.loss.prototypes.terms["image", "text"]
    assert term.prototypes.shape == (4, 32)
    assert term.labels.shape == (ROWS,)
    assert model.training


@pytest.mark.parametrize("step", [8, 10], ids=["between epochs", "within an epoch"])
def test_a_checkpoint_of_the_trainer_holds_the_prototypes(tmp_path, pairs, step):
    model, calls = fit(tmp_path / "whole", pairs, Counting(4), epochs=3)
    rest, more = fit(tmp_path / "rest", pairs, Counting(4), epochs=3, resume=tmp_path / "whole" / f"step={step}.ckpt")
    saved = unpack(torch.load(tmp_path / "whole" / f"step={step}.ckpt", weights_only=True)["state_dict"]["loss._extra_state"])
    assert len(saved["prototypes"]["index"]) == ROWS
    assert len(more) == 12 - step
    if step == 8:  # what Lightning promises: an epoch that had ended
        assert more == calls[step:]
        assert_same_state(model, rest)
        assert rest.trainer.callbacks[0].builds == 1
    else:
        kept = rest.loss.get_extra_state()["prototypes"]["terms"]
        assert all(torch.equal(a["prototypes"], b["prototypes"]) for a, b in zip(kept, saved["prototypes"]["terms"], strict=True))
        assert rest.trainer.callbacks[0].builds == 0


class Counting(ProtoCLIPCallback):
    builds = 0

    def build(self, trainer, module):
        self.builds += 1
        return super().build(trainer, module)


class Online(Clip):
    """A module without ``project``, whose step passes no index."""

    project = None

    def __init__(self):
        super().__init__()
        self.loss.set_prototypes(OnlinePrototypes(4, queue_size=40, every=4, warmup=3))

    def training_step(self, batch, number):
        parts = self.loss(**self(batch), output_dict=True)
        self.log_dict(parts)
        return sum(parts.values())


def test_online_mode_resumed_ends_where_an_uninterrupted_run_does(tmp_path, pairs):
    torch.manual_seed(0)
    model, calls = fit(tmp_path / "whole", pairs, ProtoCLIPCallback(), epochs=3, model=Online())
    assert [proto > 0 for _, proto in calls] == [False] * 3 + [True] * 9
    resume = tmp_path / "whole" / "step=8.ckpt"
    rest, more = fit(tmp_path / "rest", pairs, ProtoCLIPCallback(), epochs=3, model=Online(), resume=resume)
    assert more == calls[8:]
    assert_same_state(model, rest)
    assert rest.loss.prototypes.step == 12


def test_episodes_smaller_than_the_data_with_a_teacher(tmp_path, pairs):
    teacher = TeacherAdapter.from_tensor(torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0)))
    callback = ProtoCLIPCallback(warmup_epochs=0, teachers={"words": teacher})
    model, calls = fit(tmp_path, pairs, callback, order=EpisodeOrder(EpisodeSampler(ROWS, 20)))
    episodes = [{i for index, _ in calls[part] for i in index} for part in (slice(2), slice(2, 4))]
    assert [len(episode) for episode in episodes] == [20, 20]
    assert episodes[0] != episodes[1]
    saved = model.loss.get_extra_state()["prototypes"]
    assert set(saved["index"].tolist()) == episodes[1]
    assert {(t["student"], t["teacher"]) for t in saved["terms"]} >= {("image", "words"), ("text", "words")}
    assert all(len(t["prototypes"]) == 2 for t in saved["terms"])


def test_extraction_runs_in_the_precision_of_the_trainer(tmp_path, pairs):
    seen = []

    class Watching(Clip):
        def project(self, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().project(batch)

    fit(tmp_path, pairs, ProtoCLIPCallback(4, warmup_epochs=0), epochs=1, precision="bf16-mixed", model=Watching())
    assert seen == [True] * 4


def test_the_scale_is_clamped_after_a_batch(tmp_path, pairs):
    model = Clip()
    model.proto.logit_scale_proto.data.fill_(7.0)
    fit(tmp_path, pairs, ProtoCLIPCallback(4), epochs=1, model=model)
    assert 99 < float(model.proto.logit_scale_proto.detach().exp()) < 100.001


def test_a_module_that_lacks_what_is_asked_of_it_is_an_error(tmp_path, pairs):
    model = Clip()
    model.loss = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"Clip\.loss must be a ProtoLoss, got Linear"):
        fit(tmp_path, pairs, ProtoCLIPCallback(4), model=model)
    model.loss, model.project = ProtoLoss(), None
    with pytest.raises(TypeError, match=r"Clip must have a method project\(batch\)"):
        fit(tmp_path, pairs, ProtoCLIPCallback(4), model=model)
