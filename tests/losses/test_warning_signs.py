"""Signs that training goes wrong are said once, from their threshold on, and not below it."""

import pytest
import torch
from helpers import seeded
from kinds import IMAGE, INDEX, TEXT, K, N, built, train
from torch.utils.checkpoint import checkpoint

from protoclip_losses import (
    Clustering,
    EpisodicClusterer,
    FeatureBank,
    OnlinePrototypes,
    ProtoLoss,
    Prototypes,
    PrototypeTerm,
    _checks,
    _dtypes,
)
from protoclip_losses.losses import warning_signs

SAMPLES, EIGHT = torch.arange(80), torch.eye(8)
OWN = EIGHT[SAMPLES % 8]  # features that equal the prototype of their label: a loss of log(e^s + 7) - s at scale s
BELOW, ABOVE = 0.0235, 0.0242  # at which that is 0.99 log 8
PAGE = '(see "Warnings" in docs/dropin.rst)'


@pytest.fixture(autouse=True)
def has_begun(monkeypatch):
    monkeypatch.setattr(warning_signs, "BEGUN", 1)


def eight(valid=8, labels=None, **settings):
    """A loss with eight prototypes of text for the image encoder, of which the last are not valid."""
    is_valid = torch.arange(8) < valid
    clustering = Clustering(EIGHT, SAMPLES % valid if labels is None else labels)
    loss = ProtoLoss(target_temperature=None, **settings)
    loss.set_prototypes(Prototypes(SAMPLES, {("image", "text"): PrototypeTerm(EIGHT * is_valid[:, None], is_valid, clustering)}))
    return loss


def use(loss, scale, rows=SAMPLES, h=OWN):
    """A step of each ten rows."""
    for part in rows.split(10):
        loss(h[part], h[part], 10.0, logit_scale_proto=scale, index=part)


def at_log_k(said):
    return [message for message in said() if "log K" in message]


def test_prototypes_used_for_more_than_three_times_their_episode(said):
    loss = built()
    train(loss, IMAGE, TEXT, INDEX, times=3)
    assert said() == []
    train(loss, IMAGE, TEXT, INDEX, times=2)
    assert len(said()) == 1
    assert "more than 3 times the samples of their episode" in said()[0]
    loss.set_prototypes(loss.prototypes)  # counts begin again
    _checks.SAID.clear()
    train(loss, IMAGE, TEXT, INDEX, times=3)
    assert len(said()) == 1


def test_evaluation_does_not_use_prototypes_up(said):
    loss = built()
    with torch.no_grad():
        train(loss, IMAGE, TEXT, INDEX, times=9)
    assert said() == []


def test_online_prototypes_may_be_used_for_ever(said):
    loss = ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(K, queue_size=N, every=4, warmup=2))
    image = IMAGE.clone().requires_grad_()
    for _ in range(30):
        for rows in INDEX.split(60):
            loss(image[rows], TEXT[rows], 10.0)
    assert said() == []


@pytest.mark.parametrize("mistake", ["swapped", "other index"])
def test_prototype_accuracy_at_chance(said, mistake):
    loss, order = built(), torch.randperm(N, generator=seeded(0))
    if mistake == "swapped":
        train(loss, TEXT, IMAGE, INDEX, times=3)
    else:
        train(loss, IMAGE[order], TEXT[order], INDEX, times=3)
    messages = [message for message in said() if "has been at chance" in message]
    assert 1 <= len(messages) <= 2
    assert "swapped, or is index that of another data set?" in messages[0]


def test_chance_is_said_after_two_windows_in_a_row(said):
    loss, other = built(), torch.randperm(N, generator=seeded(0))
    for order in (other, INDEX, other):
        train(loss, IMAGE[order], TEXT[order], INDEX, times=1)
        loss.set_prototypes(loss.prototypes)
    assert said() == []
    train(loss, IMAGE[other], TEXT[other], INDEX, times=1)
    assert all("at chance for two episodes" in message for message in said())
    assert said()


def test_a_step_of_several_calls_uses_its_samples_once(said):
    """As under accumulation in open_clip, which calls the loss for each part of the same step."""
    loss = built()
    loss.prototypes.calls_per_step = 4
    loss.set_prototypes(loss.prototypes)
    train(loss, IMAGE, TEXT, INDEX, times=12)
    assert said() == []
    train(loss, IMAGE, TEXT, INDEX, times=5)
    assert len(said()) == 1


def test_a_call_that_backward_runs_again_uses_no_samples(said):
    loss = built()
    for rows in INDEX.repeat(3).split(60):
        image = IMAGE[rows].requires_grad_()
        checkpoint(loss, image, TEXT[rows], 10.0, index=rows, use_reentrant=False).backward()
    assert [message for message in said() if PAGE in message] == []  # torch 2.4's checkpoint has warnings of its own


def test_the_thresholds_of_these_tests():
    log_k = torch.tensor(8.0).log()
    below, above = (((torch.tensor(s).exp() + 7).log() - s) / log_k for s in (BELOW, ABOVE))
    assert 0.9896 < above < 0.99 < below < 0.9904


def test_a_loss_within_one_percent_of_log_k(said):
    loss = eight()
    use(loss, ABOVE)
    assert at_log_k(said) == []
    loss.set_prototypes(loss.prototypes)
    use(loss, BELOW)
    use(loss, BELOW)
    assert len(at_log_k(said)) == 1
    assert "the prototype loss of image/text has stayed within 1% of log K for a whole episode" in at_log_k(said)[0]
    assert at_log_k(said)[0].endswith(PAGE)


def test_a_loss_one_percent_above_log_k(said):
    use(eight(), BELOW, h=OWN.roll(1, 1))  # of another prototype: log(e^s + 7), by s / 8 larger than log 8
    assert len(at_log_k(said)) == 1
    _checks.SAID.clear()
    use(eight(), 0.175, h=OWN.roll(1, 1))
    assert len(at_log_k(said)) == 1


def test_log_k_is_of_valid_prototypes(said):
    """log(e^s + 3) - s is 0.99 log 4 between these scales, and far from log 8."""
    four = EIGHT[SAMPLES % 4]
    use(eight(valid=4), 0.0184, h=four)
    assert len(at_log_k(said)) == 1
    _checks.SAID.clear()
    use(eight(valid=4), 0.0186, h=four)
    assert len(at_log_k(said)) == 1


def test_a_loss_near_log_k_for_a_part_of_an_episode(said):
    use(eight(), BELOW, SAMPLES[:60])
    loss = eight()
    use(loss, 5.0, SAMPLES[:10])
    use(loss, BELOW, SAMPLES[10:])
    loss.set_prototypes(None)
    assert at_log_k(said) == []


def test_a_loss_that_falls_through_log_k(said):
    """Its mean is near log K, it is not."""
    loss = eight()
    use(loss, 0.175, SAMPLES[:40], OWN.roll(1, 1))
    use(loss, 0.025, SAMPLES[40:])
    assert at_log_k(said) == []


def test_an_episode_that_loses_its_last_batch_is_whole(said):
    use(eight(), BELOW, SAMPLES[:72])
    assert len(at_log_k(said)) == 1


@pytest.mark.parametrize("end", [lambda loss: loss.set_prototypes(None), lambda loss: loss.state_dict()], ids=["set", "save"])
def test_nothing_is_read_in_a_step_on_an_accelerator(said, end, monkeypatch):
    monkeypatch.setattr(_dtypes, "READABLE", set())
    loss = eight(check_values=False)
    use(loss, BELOW)
    use(loss, BELOW, SAMPLES[:10])  # of the next window
    assert said() == []
    end(loss)
    assert len(at_log_k(said)) == 1


def online(said, scale, steps):
    """A loss with online prototypes after as many steps of 40 rows, of which the first two are warm-up."""
    loss = ProtoLoss(target_temperature=None)
    loss.set_prototypes(OnlinePrototypes(8, queue_size=80, every=2, warmup=2))
    h = OWN.clone().requires_grad_()
    for step in range(steps):
        part = SAMPLES.roll(40 * step)[:40]
        loss(h[part], h[part], 10.0, logit_scale_proto=scale)
    return loss


def test_online_prototypes_are_watched_across_their_renewals(said):
    """A window is ten samples for each prototype: two steps."""
    online(said, BELOW, 3)
    online(said, ABOVE, 9)
    assert at_log_k(said) == []
    online(said, BELOW, 4)
    assert len(at_log_k(said)) == 2  # of both terms


def test_a_training_that_has_only_begun_is_near_log_k(said, monkeypatch):
    """Calls count over episodes: one of few steps is judged too."""
    monkeypatch.setattr(warning_signs, "BEGUN", 20)
    loss = eight()
    for _ in range(2):
        use(loss, BELOW)
        loss.set_prototypes(loss.prototypes)
        assert at_log_k(said) == []
    use(loss, BELOW)
    assert len(at_log_k(said)) == 1


def test_a_term_that_loses_its_weight_online(said):
    """In the middle of a window, which begins again."""
    loss = ProtoLoss(target_temperature=None)
    loss.set_prototypes(OnlinePrototypes(8, queue_size=80, every=2, warmup=2))
    h = OWN.clone().requires_grad_()
    for step in range(9):
        part = SAMPLES.roll(30 * step)[:30]
        loss(h[part], h[part], 10.0, teacher_features={"other": OWN[part]})
        if step == 2:
            loss.w_external = 0.0
    assert len(loss._terms.terms) == 2
    assert said() == []


def labels_of(sizes):
    """(N,), as many of each label."""
    return torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])


def clustered(labels, number):
    """A source with this clustering."""
    rows = torch.zeros(number, 2)
    term = PrototypeTerm(rows, torch.ones(number, dtype=torch.bool), Clustering(rows, labels))
    return Prototypes(torch.arange(len(labels)), {("image", "text"): term})


@pytest.mark.parametrize(
    ("labels", "number", "sign"),
    [
        (labels_of([10] * 5), 10, None),
        (labels_of([10] * 4), 10, "only 4 of 10 clusters have samples of the 40"),
        (torch.arange(10), 100, None),  # an episode with fewer samples than a clustering of the whole data set has clusters
        (torch.arange(10) // 2, 100, None),
        (torch.arange(10) // 3, 100, "only 4 of 100 clusters have samples of the 10"),
        (torch.cat([torch.arange(60), torch.full((99,), -1)]), 60, None),  # without a label is in no cluster
        (torch.full((9,), -1), 60, None),
        (torch.stack([torch.arange(10) // 5, 2 + torch.arange(10) % 3], 1), 10, None),  # several labels
        (torch.stack([torch.arange(10) // 5, 2 + torch.arange(10) % 2], 1), 10, "only 4 of 10"),
        (labels_of([20, *[1] * 80]), 81, None),
        (labels_of([21, *[1] * 80]), 81, "one of 81 clusters holds 21 of 101 samples"),
        (labels_of([5, *[1] * 5]), 6, None),  # of few clusters one may hold more than a fifth
        (labels_of([50, *[2] * 5]), 6, None),
        (labels_of([51, *[2] * 5]), 6, "one of 6 clusters holds 51 of 61 samples"),
    ],
)
def test_sizes_of_clusters(said, labels, number, sign):
    for _ in range(2):
        ProtoLoss().set_prototypes(clustered(labels, number))
    assert len(said()) == (sign is not None)
    if sign:
        assert said()[0].startswith(f"text: {sign}")
        assert said()[0].endswith(PAGE)


def test_collapsed_features_are_said_of_each_modality(said):
    collapsed = IMAGE[:2][INDEX % 2]
    prototypes = EpisodicClusterer(K).build(FeatureBank.from_features(INDEX, image=collapsed, text=TEXT))
    assert said() == []
    ProtoLoss().set_prototypes(prototypes)
    assert [message[:22] for message in said()] == ["image: only 2 of 6 clu"]
