"""ProtoCLIPCallback with the captions' own words as a teacher: clustered once, or online."""

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
from host_lightning import Clip
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fit import fit
from torch.utils.data import DataLoader

from protoclip_losses import (
    Clustering,
    EpisodeOrder,
    EpisodeSampler,
    KMeans,
    KMeansResult,
    OnlinePrototypes,
    ProtoLoss,
    WithIndex,
)
from protoclip_losses.integrations.lightning import ProtoCLIPCallback

ROWS, BATCH = 40, 10


def loader(pairs, size=ROWS):
    return DataLoader(WithIndex(pairs), BATCH, sampler=EpisodeOrder(EpisodeSampler(ROWS, size)))


class External(Callback):
    """The external part of the loss in each step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *batch):
        self.losses.append(float(trainer.callback_metrics["proto_external_loss"]))


def only_words(module=Clip):
    model = module()
    model.loss = ProtoLoss(w_proto=0.0)
    return model


@pytest.mark.parametrize("kind", ["clustering", "result", "command"])
def test_a_teacher_that_was_clustered_is_not_clustered_again(tmp_path, pairs, words, clusters, command_clusters, widths, kind):
    if kind == "result":
        clusters = KMeans(4).fit(words[torch.arange(ROWS)])
    elif kind == "command":
        clusters = KMeansResult.load(command_clusters / "clusters")
    widths.clear()
    external = External()
    callback = ProtoCLIPCallback(4, teachers={"words": clusters})
    model, _ = fit(tmp_path, loader(pairs), callback, max_epochs=3, callbacks=[external])
    assert widths == [32] * 4  # of the heads: both modalities in each of two epochs
    assert external.losses[:4] == [0.0] * 4
    assert min(external.losses[4:]) > 0.3
    assert torch.equal(model.loss.prototypes.labels_by_teacher["words"], clusters.labels)


def test_nothing_is_clustered_where_words_alone_have_a_weight(tmp_path, pairs, clusters, widths):
    external = External()
    callback = ProtoCLIPCallback(4, teachers={"words": clusters})
    model, _ = fit(tmp_path, loader(pairs, 20), callback, only_words(), max_epochs=3, callbacks=[external])
    assert widths == []
    assert set(model.loss.prototypes.terms) == {("image", "words"), ("text", "words")}
    assert min(external.losses[2:]) > 0.3


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    one.pop("loss._extra_state"), other.pop("loss._extra_state")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("mode", ["episodes", "online"])
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path, pairs, words, clusters, mode):
    ends = []
    for resume in (None, tmp_path / "step=8.ckpt"):
        saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        model = only_words() if mode == "episodes" else Online(words)
        callback = ProtoCLIPCallback(4, teachers={"words": clusters} if mode == "episodes" else None)
        options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [external := External(), saves]}
        ends.append(fit(tmp_path, loader(pairs), callback, model, resume, **options)[0])
        assert len(external.losses) == (12 if resume is None else 4)
        assert external.losses[-1] > 0.3
    assert_same_state(*ends)


class Online(Clip):
    """A module that gives the loss the features of the words of each batch."""

    project = None

    def __init__(self, words):
        super().__init__()
        self.words = words
        self.loss.set_prototypes(OnlinePrototypes(4, queue_size=40, every=4, warmup=3))

    def training_step(self, batch, number):
        words = self.words[batch["index"]].to(self.device)
        parts = self.loss(**self(batch), teacher_features={"words": words}, output_dict=True)
        self.log_dict(parts)
        return sum(parts.values())


def test_online_mode_refuses_teachers_that_it_would_never_ask(tmp_path, pairs, words):
    callback = ProtoCLIPCallback(teachers={"words": words})
    with pytest.raises(ValueError, match=r"teachers must be left out with OnlinePrototypes, got 'words': .*teacher_features="):
        fit(tmp_path, loader(pairs), callback, Online(words))
    model, _ = fit(tmp_path, loader(pairs), ProtoCLIPCallback(), Online(words))
    assert float(model.loss.prototypes.in_use["words"]) > 0


def test_the_rows_of_a_clustering_are_compared_with_the_data(tmp_path, pairs, clusters):
    few = {"words": Clustering(clusters.centroids, clusters.labels[:9])}
    with pytest.raises(
        ValueError, match=r"teachers\['words'\] must have a row for each of the 40 samples of the data set, got 9"
    ):
        fit(tmp_path, loader(pairs), ProtoCLIPCallback(4, teachers=few))
