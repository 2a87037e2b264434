"""A step over several processes: how many collectives it has, and that it reads nothing back but what came over the CPU."""

import pickle
import warnings
from contextlib import contextmanager
from functools import partial

import dense
import pytest
import torch
import torch.distributed as dist
from cases import assert_near, episode, leaf, unit
from rank_cases import rank_case
from ranks import SHARES, everyone, own_rows
from reads import seen

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss, RelationalDistillation, SigmoidPairLoss, _collectives, _dtypes

# Sizes and verdicts: numbers on the CPU, where the group has it. So are the numbers of the queue's rows, on every device.
EXCHANGE, READ, QUEUE = ("_collectives", "all_gather"), ("distributed", "_exchanged"), ("queue", "due")


@contextmanager
def readable(devices):
    """The branches of a device that no reading waits for, or with none those of an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dtypes, "READABLE", devices)
        yield patch


def features(seed, rows=6, width=5):
    return leaf(unit(rows, width, seed, torch.float32))


def proto_loss(rank, source=None, **settings):
    """A loss with two internal and two external terms, and a call of it with everything that it takes."""
    loss = ProtoLoss(target_temperature=0.1, external_target_temperature=0.1, **settings)
    prototypes = episode(teachers=("t",))
    loss.set_prototypes(source or prototypes)
    keywords = {} if source else {"index": prototypes.index[6 * rank : 6 * rank + 6]}
    if source or settings.get("w_distill"):
        keywords["teacher_features"] = {"t": unit(6, 7, 9 + rank, torch.float32)}
    if settings.get("repeats"):
        keywords["ids"] = torch.arange(6) % 4
    return lambda: loss(features(rank), features(rank + 4), leaf(torch.tensor(9.0)), output_dict=True, **keywords)


def calls(rank, equal):
    """name: (collectives of a step without the exchange, collectives of backward, the call)."""
    promise = {"equal_batch_sizes": equal}
    online = OnlinePrototypes(3, queue_size=24, every=100, warmup=1)
    repeated = InfoNCE(repeats="mask", **promise)
    distillation = RelationalDistillation(**promise)
    scale = leaf(torch.tensor(9.0))
    return {
        "InfoNCE": (3, 0, partial(InfoNCE(**promise), features(rank), features(rank + 4), scale)),
        "repeats": (3, 0, partial(repeated, features(rank), features(rank + 4), scale, ids=torch.arange(6) % 4)),
        "sigmoid": (2, 0, partial(SigmoidPairLoss(**promise), features(rank), features(rank + 4), scale, -2.0)),
        "distillation": (1, 1, partial(distillation, features(rank), unit(6, 7, 9 + rank, torch.float32), scale)),
        "ProtoLoss": (4, 0, proto_loss(rank, **promise)),
        "with all there is": (6, 2, proto_loss(rank, w_distill=1.0, repeats="share", **promise)),
        "online": (4, 0, proto_loss(rank, online, **promise)),
    }


@rank_case(world_sizes=(2,))
def a_step_waits_for_nothing_on_the_device(rank, world_size, folder):
    """Under the promise of equal sizes nothing is read and nothing exchanged on the CPU; else one exchange is read there."""
    with readable(set()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for equal in (True, False):
            for name, (forward, backward, call) in calls(rank, equal).items():
                for _ in range(2):  # the first step compares settings; an online loss has its first prototypes after it
                    call()
                with seen() as step:
                    loss = call()
                with seen() as after:
                    sum(loss.values() if isinstance(loss, dict) else [loss]).backward()
                reads = {x for x in step.reads if x != QUEUE or name != "online"}
                assert reads == (set() if equal else {READ}), (name, reads)
                assert step.collectives.count(EXCHANGE) == (not equal), (name, step.collectives)
                assert len(step.collectives) == forward + (not equal), (name, step.collectives)
                assert after.reads == [], (name, after.reads)
                assert len(after.collectives) == backward, (name, after.collectives)


@rank_case(world_sizes=(2,))
def what_is_read_or_exchanged_is_seen(rank, world_size, folder):
    x = torch.ones(3)
    for read in (x.sum().item, x.tolist, x.numpy, x.nonzero, lambda: bool(x.any()), lambda: float(x[0]), lambda: x[x > 0]):
        with seen() as found:
            read()
        assert len(found.reads) == 1
    with seen() as found:
        dist.all_reduce(x)
        (x + x)[torch.tensor([0, 1])].sum()
    assert (len(found.collectives), found.reads) == (1, [])


@rank_case(world_sizes=(2, 4))
def a_step_under_the_promise_is_exact(rank, world_size, folder):
    whole = [leaf(unit(4 * world_size, 6, seed)) for seed in (1, 2)]
    rows = own_rows(rank, [4] * world_size)
    loss, own = InfoNCE(equal_batch_sizes=True), [leaf(x[rows]) for x in whole]
    loss(*own, 10.0)
    share, wanted = loss(*own, 10.0), dense.info_nce(*whole, 10.0)
    share.backward()
    wanted.backward()
    assert_near(everyone(share).mean(), wanted)
    for x, all_rows in zip(own, whole, strict=True):
        assert_near(x.grad / world_size, all_rows.grad[rows])


@rank_case(world_sizes=(2,))
def the_promise_is_checked_with_the_settings_and_prototypes(rank, world_size, folder):
    def raises(message, call):
        with pytest.raises(ValueError, match=message):
            call()
        assert everyone(torch.ones(1)).sum() == world_size

    def step(loss, rows=3, **keywords):
        return loss(unit(rows, 5, rank), unit(rows, 5, rank + 7), 10.0, **keywords)

    for make in (InfoNCE, RelationalDistillation):
        raises(r"equal_batch_sizes must be False .* got \[3, 4\]", lambda make=make: step(make(equal_batch_sizes=True), 3 + rank))
        raises("ranks must agree on equal_batch_sizes", lambda make=make: step(make(equal_batch_sizes=bool(rank))))
    raises("ranks must agree on repeats and ids", lambda: step(InfoNCE(repeats=(None, "mask")[rank], equal_batch_sizes=True)))
    loss, prototypes = ProtoLoss(equal_batch_sizes=True), episode()
    index = prototypes.index[:3]
    loss.set_prototypes(prototypes)
    raises(r"equal_batch_sizes must be False .* got \[3, 4\]", lambda: step(loss, 3 + rank, index=prototypes.index[: 3 + rank]))
    for _ in range(2):
        assert step(loss, index=index).isfinite()
    if rank:
        loss.chunk_size = 2  # blocks may differ
    assert step(loss, index=index).isfinite()
    loss.set_prototypes(episode(seed=rank))
    raises("the checksum of the prototypes", lambda: step(loss, index=loss.prototypes.index[:3]))
    loss.set_prototypes(prototypes)
    step(loss, index=index)
    loss.w_proto = 1.0 + rank
    raises("ranks must agree on settings", lambda: step(loss, index=index))


@rank_case(world_sizes=(2, 4))
def sums_too_large_to_be_gathered_are_as_exact(rank, world_size, folder):
    """Column sums reduced by their maximum, in both kernels, and where columns need their own exponentials."""
    total = sum(SHARES[:world_size])
    near = unit(1, 6, 1) + 0.1 * unit(total, 6, 2)
    far = torch.nn.functional.normalize(torch.cat([near[:-1] + 0.1 * unit(total - 1, 6, 3), -unit(1, 6, 1)]), dim=1)
    for whole, s in (([unit(total, 6, 1), unit(total, 6, 2)], 10.0), ([torch.nn.functional.normalize(near, dim=1), far], 100.0)):
        whole = [leaf(x) for x in whole]
        wanted = dense.info_nce(*whole, s)
        wanted.backward()
        for devices in ({"cpu"}, set()):
            with readable(devices) as patch:
                patch.setattr(_collectives, "SMALL", 0)
                own = [leaf(x[own_rows(rank)]) for x in whole]
                with seen() as step:
                    share = InfoNCE()(*own, s)
            assert step.collectives.count(("_collectives", "_reduced")) == (4 if s == 100 and devices else 2)
            share.backward()
            assert_near(everyone(share).mean(), wanted)
            for x, all_rows in zip(own, whole, strict=True):
                assert_near(x.grad / world_size, all_rows.grad[own_rows(rank)])


@rank_case(world_sizes=(2, 4))
def tensors_gathered_together_keep_their_rows_and_dtypes(rank, world_size, folder):
    sizes = SHARES[:world_size]
    ranks, rows = _collectives.RankRows(dist.group.WORLD, sizes), own_rows(rank)
    total = sum(sizes)
    whole = unit(total, 3), unit(total, 2, 1, torch.bfloat16), torch.arange(total) % 5, torch.arange(total) % 2 == 0
    with seen() as found:
        for got, x in zip(ranks.gather_each(*(x[rows] for x in whole)), whole, strict=True):
            assert got.dtype == x.dtype
            assert torch.equal(got, x)
    assert len(found.collectives) == 1
    empty = _collectives.RankRows(dist.group.WORLD, [0] * (world_size - 1) + [2])
    mine = unit(2, 3) if rank == world_size - 1 else unit(2, 3)[:0]
    assert torch.equal(empty.gather_each(mine, mine[:, :1])[0], unit(2, 3))
    parts = torch.arange(float(total))[:, None] * (rank + 1)
    assert torch.equal(ranks.sum_of_own(parts), torch.arange(float(total))[:, None][rows] * sum(range(1, world_size + 1)))


@rank_case(world_sizes=(2,))
def a_loss_that_was_loaded_compares_again(rank, world_size, folder):
    def exchanges(loss):
        with seen() as step:
            loss(unit(3, 5, rank), unit(3, 5, rank + 7), 10.0)
        return step.collectives.count(EXCHANGE)

    for loss in (InfoNCE(equal_batch_sizes=True), ProtoLoss(equal_batch_sizes=True)):
        if isinstance(loss, ProtoLoss):
            loss.set_prototypes(None)
        other = pickle.loads(pickle.dumps(loss))
        assert [exchanges(loss), exchanges(loss), exchanges(other), exchanges(pickle.loads(pickle.dumps(other)))] == [1, 0, 1, 1]
        if isinstance(loss, ProtoLoss):
            loss.load_state_dict(loss.state_dict())
            assert [exchanges(loss), exchanges(loss)] == [1, 0]
