"""Centroids that lose their members come back, and the metric that says how many are in use."""

import math

import pytest
import torch
from cases import assert_near, leaf
from helpers import assert_same_state, in_new_process, seeded

from protoclip_losses import KMeans, OnlinePrototypes, ProtoLoss
from protoclip_losses.distributed import RankRows
from protoclip_losses.prototypes import BatchFeatures, renewal
from protoclip_losses.prototypes.extra_state import unpack
from protoclip_losses.prototypes.queue import FeatureQueue

K, SAMPLES, BATCH, WARMUP, WIDTH = 50, 512, 64, 10, 8
TURN, LAST = range(30, 70), 110  # steps that turn the data, and the number of steps
NAN = float("nan")


def pairs():
    """Images and texts in a narrow cone, as those of a trained CLIP."""
    image = 0.1 * torch.randn(SAMPLES, WIDTH, generator=seeded(0))
    image[:, 0] += 1
    return image, image + 0.02 * torch.randn(SAMPLES, WIDTH, generator=seeded(1))


def turned(x, angle):
    """Rows turned in the plane of the first two axes, normalised."""
    turn = torch.eye(WIDTH)
    turn[:2, :2] = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return torch.nn.functional.normalize(x @ turn, dim=1)


def train(loss, steps, data=None):
    """The data are seen over and over, and turn by 2 rad in all."""
    for step in steps:
        angle = 2 * min(max(step - TURN.start, 0), len(TURN)) / len(TURN)
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % SAMPLES
        image, text = (turned(x[rows], angle) for x in data or pairs())
        loss(leaf(image), text, 10.0)
    return loss


def online_loss(every=8):
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(OnlinePrototypes(K, queue_size=SAMPLES, every=every, warmup=WARMUP))
    return loss


def excess(prototypes):
    """K-means' objective of the queue for the valid centroids, relative to that of a fresh K-means."""
    term, queue = prototypes.terms["text", "image"], prototypes.queue.features["image"]
    objective = torch.cdist(queue, term.teacher_centroids[term.valid]).amin(1).square().sum()
    return float(objective) / KMeans(K).fit(queue).objective


@pytest.mark.parametrize("every", [4, 8])
def test_after_a_turn_of_the_data_the_centroids_are_as_good_as_those_of_a_fresh_kmeans(every):
    loss = train(online_loss(every), range(LAST))
    assert excess(loss.prototypes) < 1.1
    assert loss.metrics["prototypes_in_use/image"] == loss.metrics["prototypes_in_use/text"] == 1


def test_without_reseeding_they_are_lost(lost_centroids_stay):
    """So that the test above is one."""
    loss = train(online_loss(), range(LAST))
    assert excess(loss.prototypes) > 1.8
    assert loss.metrics["prototypes_in_use/image"] < 0.25


def test_the_metric_falls_while_features_move_faster_than_prototypes():
    loss, shares = online_loss(), []
    for step in range(LAST):
        train(loss, [step])
        shares.append(float(loss.metrics.get("prototypes_in_use/image", torch.tensor(NAN))))
    assert math.isnan(shares[WARMUP - 1])  # none in warm-up
    assert min(shares[WARMUP : TURN.start]) >= 0.9
    assert min(shares[TURN.start : TURN.stop]) < 0.6
    assert shares[-1] == 1
    assert not loss.metrics["prototypes_in_use/image"].requires_grad


def test_every_prototype_is_valid_at_once():
    """A sample whose nearest centroid has moved to it has a prototype from the next step on."""
    loss = online_loss()
    for step in range(TURN.stop):
        train(loss, [step])
        for term in loss.prototypes.terms.values():
            assert term.valid.all()
    assert loss.prototypes.in_use["image"] < 1


def few(rows, **changes):
    """Prototypes in the first step that has any; rows of 'image' in their own clusters, two of them lost in the next step."""
    prototypes = OnlinePrototypes(**{"num_prototypes": 4, "queue_size": 8, "every": 1, "warmup": 1, **changes})
    prototypes.observe(BatchFeatures({"image": rows, "text": -rows}, {}), {}, RankRows(None, [len(rows)]))
    return prototypes


def corners():
    return torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(2, 1)


def test_a_lost_centroid_moves_to_a_sample_and_its_prototype_is_the_students_of_that_sample():
    prototypes = few(corners())
    x = 10 + torch.arange(16.0).reshape(8, 2) ** 2
    prototypes.observe(BatchFeatures({"image": x, "text": -x}, {}), {}, RankRows(None, [8]))
    term = prototypes.terms["text", "image"]
    assert float(prototypes.in_use["image"]) == 1 / 4  # all are nearest to (1, 1)
    is_mean = (term.teacher_centroids - x.mean(0)).abs().amax(1) < 1e-4
    assert is_mean.sum() == 1
    moved = term.teacher_centroids[~is_mean]
    found = (moved[:, None] == x).all(2)
    assert found.sum(1).tolist() == [1, 1, 1]
    assert found.sum(0).max() == 1  # different samples
    assert torch.equal(term.prototypes[~is_mean], -moved)
    assert term.valid.all()


def test_samples_are_drawn_in_proportion_to_their_squared_distance():
    """Which of two samples a centroid moves to, over many draws."""
    x = torch.tensor([[0.0], [0.0], [1.0], [-2.0], [0.0]])
    queue = FeatureQueue(5)
    queue.push({"image": x}, {"image": torch.tensor([0, 0, 0, 0, -1])}, RankRows(None, [5]), step=1)
    drawn = [
        float(renewal.draw_far_samples(queue, "image", torch.zeros(2, 1), 1, None, seed=0, version=v)["image"])
        for v in range(2000)
    ]
    assert set(drawn) == {1.0, -2.0}
    assert drawn.count(-2.0) / 2000 == pytest.approx(4 / 5, abs=0.03)


def test_more_lost_centroids_than_samples_apart_from_their_centroid():
    prototypes = few(corners())
    x = torch.tensor([[5.0, 5.0]] * 7 + [[9.0, 9.0]])
    prototypes.observe(BatchFeatures({"image": x, "text": -x}, {}), {}, RankRows(None, [8]))
    assert float(prototypes.in_use["image"]) == 1 / 4
    term = prototypes.terms["text", "image"]
    assert term.valid.all()  # the mean and three of eight samples
    for _ in range(2):
        prototypes.observe(BatchFeatures({"image": x, "text": -x}, {}), {}, RankRows(None, [8]))
    term = prototypes.terms["text", "image"]
    assert term.valid.sum() == 2  # there are only two different samples
    assert_near(term.teacher_centroids[term.valid].sum(0), torch.tensor([14.0, 14.0]))


def test_a_sample_without_the_students_features_gives_a_centroid_but_no_prototype():
    prototypes = few(corners())
    x = 10 + torch.arange(16.0).reshape(8, 2) ** 2
    text = torch.full((8, 2), NAN).index_fill(0, torch.tensor([0]), 1.0)
    prototypes.observe(BatchFeatures({"image": x, "text": text}, {}), {}, RankRows(None, [8]))
    term = prototypes.terms["text", "image"]
    assert term.valid.sum() in (1, 2)
    assert torch.isfinite(term.prototypes).all()
    assert torch.isfinite(term.teacher_centroids).all()


def test_two_runs_are_equal_whatever_the_global_generator():
    one = train(online_loss(), range(TURN.stop)).state_dict()["_extra_state"]["prototypes"]
    torch.manual_seed(7)
    other = train(online_loss(), range(TURN.stop)).state_dict()["_extra_state"]["prototypes"]
    assert_same_state(one, other)


CONTINUE = """
import sys, torch
from test_online_reseeding import train
from protoclip_losses import ProtoLoss
loss = ProtoLoss(target_temperature=0.1)
loss.load_state_dict(torch.load(sys.argv[1], weights_only=True))
train(loss, range(37, 70))
torch.save((loss.state_dict(), loss.metrics), sys.argv[2])
"""


def test_a_saved_loss_reseeds_in_a_new_process_as_it_would_have(tmp_path, request):
    loss = train(online_loss(), range(37))  # within a cycle, after members were lost
    torch.save(loss.state_dict(), tmp_path / "state.pt")
    train(loss, range(37, 70))
    in_new_process(CONTINUE, tmp_path / "state.pt", tmp_path / "done.pt", folders=[request.path.parent])
    state, metrics = torch.load(tmp_path / "done.pt", weights_only=True)
    assert_same_state(loss.state_dict()["_extra_state"]["prototypes"], unpack(state["_extra_state"])["prototypes"])
    assert_same_state(loss.metrics, metrics)
    assert loss.metrics["prototypes_in_use/image"] < 1


def test_states_from_before_reseeding_are_read_and_their_centroids_come_back(lost_centroids_stay, monkeypatch):
    state = {"_extra_state": unpack(train(online_loss(), range(TURN.stop)).state_dict()["_extra_state"])}
    for name in ("labels", "in_use"):
        del state["_extra_state"]["prototypes"][name]
    monkeypatch.undo()
    loss = ProtoLoss(target_temperature=0.1)
    loss.load_state_dict(state)
    assert loss.prototypes.in_use == {}
    train(loss, range(TURN.stop, LAST))
    assert excess(loss.prototypes) < 1.1
    assert loss.metrics["prototypes_in_use/image"] == 1


def test_a_state_with_labels_of_other_rows_changes_nothing():
    state = train(online_loss(), range(WARMUP)).state_dict()["_extra_state"]["prototypes"]
    state["labels"] = {name: x[:-1] for name, x in state["labels"].items()}
    prototypes = online_loss().prototypes
    with pytest.raises(ValueError, match=r"labels of .* in the state must have 512 rows as sample_number, got 511"):
        prototypes.load_state_dict(state)
    assert prototypes.step == 0
    assert not prototypes.queue.features
