"""ProtoCLIPCallback over several fits, with Lightning's tuners, and with any DataLoader."""

import copy

import pytest
import torch

pytest.importorskip("lightning")
from host_lightning import Clip
from host_pairs import PicturePairs
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning_fit import QUIET, Counting, Seen, fit
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler

from protoclip_losses import EpisodeOrder, EpisodeSampler, EpisodicClusterer, TeacherAdapter, WithIndex
from protoclip_losses.integrations.lightning import ProtoCLIPCallback

ROWS, BATCH = 40, 10


@pytest.fixture(scope="module")
def pairs():
    return WithIndex(PicturePairs(ROWS))


def loader(pairs, size=ROWS):
    return DataLoader(pairs, BATCH, sampler=EpisodeOrder(EpisodeSampler(ROWS, size)))


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    one.pop("loss._extra_state"), other.pop("loss._extra_state")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("same_module", [False, True])
def test_a_second_fit_with_one_callback_starts_afresh(tmp_path, pairs, same_module):
    callback = Counting(4, clusterer=EpisodicClusterer(4, warm_start=True, niter=1))
    first, seen = fit(tmp_path, loader(pairs), callback)
    assert callback.builds == 1
    second, again = fit(tmp_path, loader(pairs), callback, first if same_module else None)
    assert callback.builds == 2
    for calls in (seen.calls, again.calls):
        assert [proto > 0.3 for _, proto in calls] == [False] * 4 + [True] * 4
    if not same_module:
        assert again.calls == seen.calls
        assert_same_state(first, second)


def test_a_fit_after_a_fast_dev_run_is_a_whole_one(tmp_path, pairs):
    callback, alone = Counting(4, warmup_epochs=0), Counting(4, warmup_epochs=0)
    fit(tmp_path, loader(pairs), callback, fast_dev_run=True)
    model, seen = fit(tmp_path, loader(pairs), callback)
    other, wanted = fit(tmp_path, loader(pairs), alone)
    assert (callback.builds, alone.builds) == (3, 2)
    assert seen.calls == wanted.calls
    assert_same_state(model, other)


def test_a_trainer_that_fits_on_continues_with_the_next_episode(tmp_path, pairs):
    torch.manual_seed(0)
    callback, seen, model = Counting(4, warmup_epochs=0), Seen(), Clip()
    trainer = Trainer(max_epochs=1, callbacks=[callback, seen], default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    trainer.fit(model, loader(pairs, 20))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(pairs, 20))
    assert callback.builds == 2
    assert seen.samples == [i for n in (0, 1) for i in EpisodeSampler(ROWS, 20).episode(n).index.tolist()]


def test_a_resumed_fit_keeps_what_the_clusterer_knew(tmp_path, pairs):
    def options():
        saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return {"max_epochs": 4, "callbacks": [saves], "enable_checkpointing": True}

    callbacks = [ProtoCLIPCallback(clusterer=EpisodicClusterer(4, warm_start=True, niter=1)) for _ in range(2)]
    whole, seen = fit(tmp_path, loader(pairs), callbacks[0], **options())
    rest, again = fit(tmp_path, loader(pairs), callbacks[1], resume=tmp_path / "step=12.ckpt", **options())
    assert again.calls == seen.calls[12:]
    assert_same_state(whole, rest)
    assert callbacks[0].clusterer.previous.report.drift == callbacks[1].clusterer.previous.report.drift


class Validated(Clip):
    """A module whose validation calls the loss."""

    def __init__(self):
        super().__init__()
        self.lr = 1e-3

    def validation_step(self, batch, number):
        prototypes = self.loss.prototypes
        self.loss.set_prototypes(None)
        self.log("val_loss", self.loss(**self(batch)))
        self.loss.set_prototypes(prototypes)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Plainly(Validated):
    def validation_step(self, batch, number):
        self.log("val_loss", self.loss(**self(batch)))


def test_validation_alone_and_before_the_first_epoch(tmp_path, pairs):
    trainer = Trainer(callbacks=[ProtoCLIPCallback(4)], default_root_dir=tmp_path, **QUIET)
    model = Plainly()
    (alone,) = trainer.validate(model, loader(pairs), verbose=False)
    assert alone["val_loss"] > 0.3
    model.project = None  # which extraction needs and validation does not
    assert trainer.validate(model, loader(pairs), verbose=False) == [alone]
    trainer = Trainer(
        callbacks=[ProtoCLIPCallback(4)],
        default_root_dir=tmp_path,
        max_epochs=2,
        num_sanity_val_steps=2,
        **QUIET,
        limit_val_batches=2,
    )
    trainer.fit(Validated(), loader(pairs), loader(pairs))
    assert len(trainer.lightning_module.loss.prototypes.index) == ROWS


def test_validation_leaves_the_prototypes_of_a_fit(tmp_path, pairs):
    model, _ = fit(tmp_path, loader(pairs), ProtoCLIPCallback(4), Validated())
    held = model.loss.prototypes
    Trainer(callbacks=[ProtoCLIPCallback(4)], default_root_dir=tmp_path, **QUIET).validate(model, loader(pairs), verbose=False)
    assert model.loss.prototypes is held


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_learning_rate_is_found_without_prototypes_and_the_fit_begins_anew(tmp_path, pairs, warmup):
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    callback, alone = Counting(4, warmup_epochs=warmup), Counting(4, warmup_epochs=warmup)
    other = Validated()
    model, seen = fit(tmp_path, loader(pairs), callback, copy.deepcopy(other), callbacks=[finder], enable_checkpointing=True)
    other, wanted = fit(tmp_path, loader(pairs), alone, other)
    assert len(finder.optimal_lr.results["loss"]) == 6
    assert callback.builds == alone.builds == 2 - warmup
    assert seen.calls == wanted.calls
    assert_same_state(model, other)


def test_tuner_and_batch_size_finder(tmp_path, pairs):
    class Sized(Clip):
        lr, batch_size = 1e-3, BATCH

        def train_dataloader(self):
            return DataLoader(pairs, self.batch_size, shuffle=True)

    callback, model = Counting(4, warmup_epochs=0), Sized()
    trainer = Trainer(max_epochs=2, callbacks=[callback], default_root_dir=tmp_path, **QUIET)
    found = Tuner(trainer).lr_find(model, num_training=5)
    assert len(found.results["loss"]) == 5
    Tuner(trainer).scale_batch_size(model, steps_per_trial=1, max_trials=2, init_val=4)
    assert callback.builds == 0
    trainer.fit(model)
    assert callback.builds == 2
    assert len(model.loss.prototypes.index) == ROWS
    finder, callback = BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=4), Counting(4, warmup_epochs=0)
    model = Sized()
    Trainer(max_epochs=2, callbacks=[callback, finder], default_root_dir=tmp_path, **QUIET).fit(model)
    assert callback.builds == 2


class Pairwise:
    """A batch sampler with nothing but an order: neighbours together, the last of them alone."""

    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, ROWS - 2, 2)] + [[ROWS - 2]])

    def __len__(self):
        return ROWS // 2


class Unsized(Pairwise):
    __len__ = None


def test_any_batch_sampler(tmp_path, pairs):
    for make in (
        lambda: BatchSampler(RandomSampler(range(ROWS)), BATCH, drop_last=True),
        lambda: BatchSampler(EpisodeOrder(EpisodeSampler(ROWS, 20)), BATCH, drop_last=False),
        Pairwise,
    ):
        callback = Counting(warmup_epochs=0)
        model, seen = fit(tmp_path, DataLoader(pairs, batch_sampler=make()), callback, max_epochs=1)
        assert callback.builds == 1
        held = set(model.loss.prototypes.index.tolist())
        assert set(seen.samples) <= held
        assert len(held) == (20 if len(seen.samples) == 20 else ROWS)
        assert model.loss.prototypes.terms["image", "text"].prototypes.shape[0] == len(held) // 10


def test_extraction_is_in_batches_of_about_the_size_of_training(tmp_path, pairs):
    sizes = []

    class Watching(Clip):
        def project(self, batch):
            sizes.append(len(batch["index"]))
            return super().project(batch)

    fit(tmp_path, DataLoader(pairs, batch_sampler=Pairwise()), ProtoCLIPCallback(4, warmup_epochs=0), Watching(), max_epochs=1)
    assert sizes == [2] * 20


def test_samples_of_a_subset_and_batches_that_the_data_set_makes(tmp_path, pairs):
    model, seen = fit(
        tmp_path, DataLoader(pairs, BATCH, sampler=SubsetRandomSampler([1, 3, 5, 30, 32])), ProtoCLIPCallback(2, warmup_epochs=0)
    )
    assert model.loss.prototypes.index.tolist() == sorted(seen.samples[:5]) == [1, 3, 5, 30, 32]
    batches = [torch.utils.data.default_collate([pairs[i] for i in range(at, at + BATCH)]) for at in range(0, ROWS, BATCH)]
    model, seen = fit(tmp_path, DataLoader(batches, batch_size=None), ProtoCLIPCallback(warmup_epochs=0))
    assert model.loss.prototypes.terms["image", "text"].prototypes.shape[0] == ROWS // 10
    assert seen.samples[:ROWS] == list(range(ROWS))


class Stream(IterableDataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return iter([self.pairs[i] for i in range(ROWS)])


def test_data_that_cannot_be_extracted_are_an_error_before_the_first_batch(tmp_path, pairs):
    one, seen = loader(pairs), []

    class Watched(ProtoCLIPCallback):
        def on_train_batch_start(self, *args):
            seen.append(1)
            super().on_train_batch_start(*args)

    with pytest.raises(TypeError, match="must have one training DataLoader, got 2 in a dict"):
        fit(tmp_path, {"a": one, "b": one}, Watched(4))
    with pytest.raises(TypeError, match="must have one training DataLoader, got 2 in a list"):
        fit(tmp_path, [one, one], Watched(4))
    with pytest.raises(TypeError, match=r"read by number, got Stream: for a stream, set OnlinePrototypes in the loss"):
        fit(tmp_path, DataLoader(Stream(pairs), BATCH), Watched(4))
    assert not seen
    _, calls = fit(tmp_path, DataLoader(Stream(pairs), BATCH), ProtoCLIPCallback(4, warmup_epochs=2))  # never extracts
    assert len(calls.calls) == 8


def test_a_teacher_with_other_rows_than_the_data_is_noticed_once(tmp_path, pairs):
    def teacher(rows):
        return {"words": TeacherAdapter.from_tensor(torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)))}

    with pytest.warns(UserWarning, match=r"teachers\['words'\] has 50 rows and the data set 40 samples") as seen:
        fit(tmp_path, loader(pairs), ProtoCLIPCallback(4, teachers=teacher(50)), max_epochs=3)
    assert len([w for w in seen if "has 50 rows" in str(w.message)]) == 1
    with pytest.raises(
        ValueError, match=r"teachers\['words'\] must have a row for each of the 40 samples of the data set, got 9"
    ):
        fit(tmp_path, loader(pairs), ProtoCLIPCallback(4, teachers=teacher(9)))


class Towers(LightningModule):
    """The example without heads and loss."""

    def __init__(self):
        super().__init__()
        clip = Clip()
        self.image, self.text, self.logit_scale = clip.image, clip.text, clip.logit_scale


def test_a_checkpoint_opens_without_the_callback(tmp_path, pairs):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    model, _ = fit(tmp_path, loader(pairs), ProtoCLIPCallback(4), callbacks=[saves], enable_checkpointing=True)
    file = tmp_path / "step=8.ckpt"
    read = Clip.load_from_checkpoint(file)
    assert_same_state(model, read)
    assert read.loss.prototypes.index.tolist() == model.loss.prototypes.index.tolist()
    towers = Towers.load_from_checkpoint(file, strict=False)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in towers.state_dict().items())
    trainer = Trainer(max_epochs=3, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer.fit(Clip(), loader(pairs), ckpt_path=file)
    assert trainer.global_step == 12
