"""Online prototypes on several processes: lost centroids, activation checkpointing, and states that do not fit together."""

import math

import pytest
import torch
from cases import assert_near, leaf, unit
from rank_cases import rank_case
from ranks import LOCAL, assert_same_on_every_rank, everyone
from torch.utils.checkpoint import checkpoint

from protoclip_losses import OnlinePrototypes, ProtoLoss

SETTINGS = {"num_prototypes": 6, "queue_size": 48, "every": 3, "warmup": 4}


def online_loss(**options):
    loss = ProtoLoss(target_temperature=0.1, **options)
    loss.set_prototypes(OnlinePrototypes(**SETTINGS))
    return loss


def drifting(step, rows=16):
    """Rows of a narrow cone that turns: in every step 0.3 rad, so that centroids lose their members."""
    x = torch.tensor([math.cos(0.3 * step), math.sin(0.3 * step), 0, 0, 0, 0]) + 0.3 * unit(rows, 6, step, torch.float32)
    return torch.nn.functional.normalize(x, dim=1)


@rank_case
def lost_centroids_come_back_as_on_one_process(rank, world_size, folder):
    whole, own = online_loss(**LOCAL), online_loss()
    rows = slice(16 * rank // world_size, 16 * (rank + 1) // world_size)
    lowest = 1.0
    for step in range(19):
        x = drifting(step)
        whole(leaf(x), x.roll(1, 1), 10.0)
        own(leaf(x[rows]), x.roll(1, 1)[rows], 10.0)
        lowest = min(lowest, float(own.metrics.get("prototypes_in_use/image", torch.ones(()))))
    assert lowest < 1
    assert whole.metrics.keys() == own.metrics.keys()
    for key, term in whole.prototypes.terms.items():
        mine = own.prototypes.terms[key]
        assert_same_on_every_rank(mine.prototypes, mine.teacher_centroids, mine.valid.int())
        assert_near(mine.teacher_centroids, term.teacher_centroids, 1e-5)
        assert_near(mine.prototypes, term.prototypes, 1e-5)
        assert_near(own.prototypes.in_use[key[1]], whole.prototypes.in_use[key[1]])


@rank_case(world_sizes=(2, 4))
def a_rank_with_few_samples_has_the_prototypes_of_the_others(rank, world_size, folder):
    loss, lowest = online_loss(), 1.0
    for step in range(19):
        x = drifting(step)[: 16 if rank == 0 else rank]
        loss(leaf(x), x.roll(1, 1), 10.0)
        lowest = min(lowest, float(loss.metrics.get("prototypes_in_use/image", torch.ones(()))))
    assert lowest < 1
    for term in loss.prototypes.terms.values():
        assert_same_on_every_rank(term.prototypes, term.teacher_centroids, term.valid.int())


@rank_case
def a_checkpointed_step_is_that_of_a_plain_one(rank, world_size, folder):
    plain, twice = online_loss(), online_loss()
    for step in range(11):
        x = drifting(step, 5 + rank)
        one, other = leaf(x), leaf(x)
        plain(one, x.roll(1, 1), 10.0).backward()
        checkpoint(twice, other, x.roll(1, 1), 10.0, use_reentrant=False).backward()
        assert torch.equal(one.grad, other.grad)
    assert repr(plain.prototypes) == repr(twice.prototypes)


@rank_case
def a_state_of_another_number_of_processes_goes_on_with_its_most_recent_samples(rank, world_size, folder):
    before, after = online_loss(**LOCAL), online_loss()
    for step in range(9):
        x = drifting(step)
        before(leaf(x), x.roll(1, 1), 10.0)
    after.load_state_dict(before.state_dict())
    for step in range(9, 16):
        x = drifting(step)[: 16 // world_size]
        after(leaf(x), x.roll(1, 1), 10.0)
        queue = after.prototypes.queue
        assert len(queue.sample_number) == 48 // world_size
        assert sorted(queue.sample_number.tolist())[0] >= 16 * step + 16 - 48  # the most recent, of this rank or of the state
        assert all((x >= 0).all() for x in queue.labels.values())


def raises_on_both(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert everyone(torch.ones(1)).sum() == 2  # the group works afterwards


@rank_case(world_sizes=(2,), own_processes=True)
def a_rank_that_is_resumed_without_its_state_is_an_error_on_all(rank, world_size, folder):
    for steps in (2, 4, 6):  # in warm-up, at its end, after it
        loss = online_loss()
        for step in range(steps):
            x = drifting(step)
            loss(leaf(x), x.roll(1, 1), 10.0)
        resumed = online_loss()
        if rank == 0:
            resumed.load_state_dict(loss.state_dict())
        message = rf"ranks must agree on .*step, got {steps} on rank 0, 0 on rank 1"
        raises_on_both(lambda resumed=resumed, x=x: resumed(leaf(x), x.roll(1, 1), 10.0), message)


@rank_case(world_sizes=(2,), own_processes=True)
def states_of_two_steps_are_an_error_on_all(rank, world_size, folder):
    loss, states = online_loss(), []
    for step in range(8):
        x = drifting(step)
        loss(leaf(x), x.roll(1, 1), 10.0)
        states.append(loss.state_dict())
    for first, second in ((1, 2), (5, 6), (6, 7)):
        resumed = online_loss()
        resumed.load_state_dict(states[(first, second)[rank]])
        message = rf"step, got {first + 1} on rank 0, {second + 1} on rank 1"
        raises_on_both(lambda resumed=resumed, x=x: resumed(leaf(x), x.roll(1, 1), 10.0), message)
