"""ProtoCLIPTrainer with the captions' own words as a teacher: clustered once, in each episode, or online."""

import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from hf_trainer import Recorded, trainer, weights

from protoclip_losses import Clustering, KMeans, KMeansResult, OnlinePrototypes, ProtoLoss

ROWS = 44


def external(loss):
    return [parts["proto_external_loss"] for _, parts in loss.calls]


@pytest.mark.parametrize("kind", ["clustering", "result", "command"])
def test_a_teacher_that_was_clustered_is_not_clustered_again(tmp_path, pairs, words, clusters, command_clusters, widths, kind):
    if kind == "result":
        clusters = KMeans(4).fit(words[torch.arange(ROWS)])
    elif kind == "command":
        clusters = KMeansResult.load(command_clusters / "clusters")
    widths.clear()
    loss = Recorded()
    run = trainer(tmp_path, pairs, loss=loss, teachers={"words": clusters}, arguments={"num_train_epochs": 3})
    run.train()
    assert widths == [8] * 4  # of the heads: both modalities in each of two epochs
    assert external(loss)[:4] == [0.0] * 4
    assert min(external(loss)[4:]) > 0.3
    assert torch.equal(loss.prototypes.labels_by_teacher["words"], clusters.labels)


def test_nothing_is_clustered_where_words_alone_have_a_weight(tmp_path, pairs, clusters, widths):
    loss = Recorded(w_proto=0.0)
    run = trainer(tmp_path, pairs, loss=loss, teachers={"words": clusters}, episode_size=22, arguments={"num_train_epochs": 3})
    run.train()
    assert widths == []
    assert set(loss.prototypes.terms) == {("image", "words"), ("text", "words")}
    assert min(external(loss)[2:]) > 0.3
    assert {parts["proto_loss"] for _, parts in loss.calls} == {0.0}
    plain = trainer(tmp_path, pairs, loss=Recorded(w_proto=0.0), warmup_epochs=0, arguments={"num_train_epochs": 1})
    plain.train()  # without a teacher there is something to build all the same
    assert set(plain.loss.prototypes.terms) == {("image", "text"), ("text", "image")}


def test_a_run_killed_in_the_middle_of_an_epoch_ends_where_an_uninterrupted_one_does(tmp_path, pairs, clusters):
    options = {"teachers": {"words": clusters}, "arguments": {"num_train_epochs": 3}}
    whole = trainer(tmp_path / "whole", pairs, **options)
    whole.train()
    whole.save_model(tmp_path / "end")
    (tmp_path / "rest").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "rest" / "checkpoint-6")  # 2 of epoch 1's 4 steps
    rest = trainer(tmp_path / "rest", pairs, loss=Recorded(), **options)
    rest.train(resume_from_checkpoint=True)
    assert len(rest.loss.calls) == 6
    assert min(external(rest.loss)) > 0.3
    rest.save_model(tmp_path / "other end")
    one, other = weights(tmp_path / "other end"), weights(tmp_path / "end")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_rows_of_a_clustering_are_compared_with_the_data(tmp_path, pairs, clusters):
    few = Clustering(clusters.centroids, clusters.labels[:40])
    with pytest.raises(ValueError, match=r"teachers\['words'\] must have a row for each of the 44 samples .*, got 40 rows"):
        trainer(tmp_path, pairs, teachers={"words": few})
    more = Clustering(clusters.centroids, torch.cat([clusters.labels, clusters.labels]))
    with pytest.warns(UserWarning, match=r"teachers\['words'\] has 88 rows and train_dataset 44 samples"):
        trainer(tmp_path, pairs, teachers={"words": more})


class Watched(ProtoLoss):
    """Remembers the teachers' features of each call."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def forward(self, *args, **inputs):
        self.seen.append((inputs.get("index"), inputs["teacher_features"]))
        return super().forward(*args, **inputs)


def online(loss):
    loss.set_prototypes(OnlinePrototypes(4, queue_size=22, every=2, warmup=3))
    return loss


def test_online_mode_is_given_the_features_of_the_captions(tmp_path, pairs, words):
    loss = online(Watched())
    run = trainer(tmp_path, pairs, loss=loss, teachers={"words": words})
    run.train()
    index = torch.cat([run.order.episodes.episode(number).index for number in range(2)])
    rows = torch.cat([teachers["words"] for _, teachers in loss.seen])
    torch.testing.assert_close(rows, words.encode([pairs.captions[i] for i in index]))
    assert {number for number, _ in loss.seen} == {None}
    assert float(loss.prototypes.in_use["words"]) > 0


def test_online_mode_needs_features_and_says_so(tmp_path, pairs, clusters):
    with pytest.raises(TypeError, match=r"teachers\['words'\] must be a TeacherAdapter with OnlinePrototypes, .* a Clustering"):
        trainer(tmp_path, pairs, loss=online(ProtoLoss()), teachers={"words": clusters}).train()


def test_a_teacher_is_distilled_in_warm_up_too(tmp_path, pairs, words, clusters):
    loss = Watched(w_distill=1.0)
    teachers = {"words": words, "clusters": clusters}  # of which there is nothing to distill
    trainer(tmp_path, pairs, loss=loss, teachers=teachers).train()
    assert len(loss.seen) == 8
    for index, features in loss.seen:
        assert set(features) == {"words"}
        assert torch.equal(features["words"], words[index])
