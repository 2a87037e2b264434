"""The sigmoid loss and GradCache on several processes, against one process on all rows."""

import copy

import dense
import pytest
import torch
from cases import assert_near, episode, leaf, unit
from rank_cases import rank_case
from ranks import LOCAL, SHARES, assert_same_on_every_rank, everyone, own_rows, raises_everywhere
from torch.nn.parallel import DistributedDataParallel
from towers import towers

from protoclip_losses import GradCache, InfoNCE, ProtoLoss, SigmoidPairLoss


def rows_of(world_size):
    return sum(SHARES[:world_size])


@rank_case
def the_share_of_the_sigmoid_loss_is_exact(rank, world_size, folder):
    """Mean over ranks of the loss, and gradients of rows, scale and bias, against the dense form of the whole batch."""
    total = rows_of(world_size)
    whole = [leaf(unit(total, 6, seed)) for seed in (1, 2)]
    scalars = [leaf(torch.tensor(x, dtype=torch.float64)) for x in (10.0, -4.0)]
    wanted = dense.sigmoid_pair_loss(*whole, *scalars)
    wanted.backward()
    proto = ProtoLoss(pair_loss="sigmoid")
    proto.set_prototypes(None)
    for loss in (SigmoidPairLoss(), SigmoidPairLoss(chunk_size=2), SigmoidPairLoss(memory_budget=200), proto):
        own = [leaf(x[own_rows(rank)]) for x in whole] + [leaf(x) for x in scalars]
        share = loss(*own)
        share.backward()
        assert_near(everyone(share).mean(), wanted)
        for got, x in zip(own[:2], whole, strict=True):
            assert_near(got.grad / world_size, x.grad[own_rows(rank)])
        for got, x in zip(own[2:], scalars, strict=True):
            assert_near(everyone(got.grad).mean(), x.grad)
        first = (whole[0] @ whole[1].T).argmax(1) == torch.arange(total)
        assert_near(loss.metrics["contrastive_accuracy"], first[own_rows(rank)].double().mean())
    with torch.no_grad():
        assert_near(everyone(SigmoidPairLoss()(*own)).mean(), wanted)


@rank_case
def no_rank_holds_the_logits_of_all_pairs(rank, world_size, folder):
    """Blocks are of own rows; the largest tensor of a call is the texts of all ranks, or a block within the budget."""
    total, largest = 256 * world_size, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.nbytes if isinstance(out, torch.Tensor) else 0)
            return out

    own = [leaf(unit(256, 2, seed + rank)) for seed in (1, 9)]
    with Watch():
        SigmoidPairLoss(chunk_size=4)(*own, 10.0, -4.0).backward()
    assert 0 < largest <= 4 * total * 8


@rank_case
def the_sigmoid_loss_under_ddp(rank, world_size, folder):
    """Gradients of encoders, scale and bias are those of one process on the whole batch."""
    rows = own_rows(rank)
    for name in ("SigmoidPairLoss", "ProtoLoss"):
        model = towers(heads=name == "ProtoLoss", dtype=torch.float64)
        ours = DistributedDataParallel(copy.deepcopy(model))
        inputs = [unit(rows_of(world_size), 7, seed) for seed in (1, 2)]
        prototypes = episode(width=5)
        arguments = {"index": prototypes.index[: rows_of(world_size)]} if name == "ProtoLoss" else {}
        make = (lambda **x: ProtoLoss(pair_loss="sigmoid", **x)) if name == "ProtoLoss" else SigmoidPairLoss
        losses = [make(), make(**LOCAL)]
        for loss in losses if arguments else []:
            loss.set_prototypes(prototypes)
        losses[0](**ours(*(x[rows] for x in inputs)), **{k: x[rows] for k, x in arguments.items()}).backward()
        losses[1](**model(*inputs), **arguments).backward()
        assert_gradients(ours.module, model)


def assert_gradients(one, other, tolerance=1e-9):
    size = float(torch.cat([p.grad.flatten() for p in other.parameters()]).norm())
    for (name, p), q in zip(one.named_parameters(), other.named_parameters(), strict=True):
        error = float((p.grad - q[1].grad).norm())
        assert error <= tolerance * max(float(q[1].grad.norm()), 0.01 * size), f"{name}: {error}"
    assert_same_on_every_rank(*(p.grad for p in one.parameters()))


@rank_case
def grad_cache_under_ddp(rank, world_size, folder):
    """Ranks with unequal rows, and unequal numbers of chunks: the gradient of one process, averaged over ranks once a call."""
    total, rows = rows_of(world_size), own_rows(rank)
    prototypes = episode(width=5)
    index = prototypes.index[:total]
    for make, heads in ((InfoNCE, False), (SigmoidPairLoss, False), (ProtoLoss, True)):
        model = towers(heads=heads, dtype=torch.float64)
        ours = DistributedDataParallel(copy.deepcopy(model))  # find_unused_parameters=False
        reductions = []
        ours.register_comm_hook(reductions, averaged)
        loss, whole = make(), make(**LOCAL)
        arguments = {}
        if heads:
            loss.set_prototypes(prototypes)
            whole.set_prototypes(prototypes)
            arguments = {"index": index}
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours.module, model)]
        cached = GradCache(loss, chunk_size=2)  # of shares of 5, 1, 7 and 3 rows: 3, 1, 4 and 2 chunks
        for step in range(3):  # buckets are rebuilt after the first
            inputs = [unit(total, 7, 10 * step + seed) for seed in (1, 2)]
            for optimizer in optimizers:
                optimizer.zero_grad()
            share = cached(ours, *(x[rows] for x in inputs), **{k: x[rows] for k, x in arguments.items()})
            wanted = whole(**model(*inputs), **arguments)
            wanted.backward()
            assert_near(everyone(share).mean(), wanted)
            assert_gradients(ours.module, model)
            assert len(reductions) == step + 1
            for optimizer in optimizers:
                optimizer.step()


def averaged(seen, bucket):
    """DDP's mean over ranks of a bucket of gradients, counted."""
    seen.append(bucket.index())
    torch.distributed.all_reduce(bucket.buffer().div_(torch.distributed.get_world_size()))
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@rank_case
def grad_cache_replays_dropout_under_ddp(rank, world_size, folder):
    """Each rank drops units of its own, in both runs the same: the reference keeps the graphs of all chunks."""
    model = towers(heads=False, dtype=torch.float64)
    for tower in (model.image, model.text):
        tower.insert(3, torch.nn.Dropout(0.5))
    ours, reference = (DistributedDataParallel(copy.deepcopy(model)) for _ in range(2))
    inputs = [unit(rows_of(world_size), 7, seed)[own_rows(rank)] for seed in (1, 2)]
    torch.manual_seed(rank)
    share = GradCache(SigmoidPairLoss(), chunk_size=2)(ours, *inputs)
    torch.manual_seed(rank)
    outputs = [reference.module(*x) for x in zip(*(x.split(2) for x in inputs), strict=True)]
    joined = [torch.cat([out[name] for out in outputs]) for name in ("image_features", "text_features")]
    wanted = SigmoidPairLoss()(*joined, outputs[0]["logit_scale"], outputs[0]["logit_bias"])
    wanted.backward()
    assert_near(share, wanted)
    for p, q in zip(ours.module.parameters(), reference.module.parameters(), strict=True):
        assert_near(p.grad, everyone(q.grad).mean(0), 1e-9)


@rank_case(world_sizes=(2, 4))
def bad_input_of_the_sigmoid_loss_raises_on_all(rank, world_size, folder):
    bad = world_size - 1
    x = unit(3, 4, rank)
    for changed, error, message in (
        ({"image_features": x * torch.nan}, ValueError, "image_features must be finite"),
        ({"text_features": x[:2]}, ValueError, "text_features must have 3 rows"),
        ({"logit_bias": None}, TypeError, "logit_bias must be a float"),
        ({"logit_bias": float("inf")}, ValueError, "logit_bias must be finite"),
    ):
        given = {"image_features": x, "text_features": x, "logit_scale": 10.0, "logit_bias": -3.0}
        raises_everywhere(
            lambda c=changed, g=given: SigmoidPairLoss()(**{**g, **(c if rank == bad else {})}), bad, error, message
        )
    proto = ProtoLoss(pair_loss="sigmoid")
    proto.set_prototypes(None)
    raises_everywhere(lambda: proto(x, x, 10.0, None if rank == bad else -3.0), bad, ValueError, "logit_bias must be given")
    other = ProtoLoss(pair_loss="sigmoid" if rank else "info_nce")
    other.set_prototypes(None)
    with pytest.raises(ValueError, match=r"ranks must agree on settings, got .*pair_loss"):
        other(x, x, 10.0, -3.0)
    learned = torch.tensor(-3.0, requires_grad=rank == bad)
    with pytest.raises(ValueError, match="ranks must agree on requires_grad"):
        SigmoidPairLoss()(x, x, 10.0, learned)


@rank_case
def the_sigmoid_loss_without_a_group_talks_to_nobody(rank, world_size, folder):
    if rank == 0:
        x = unit(6, 5), unit(6, 5, 1), 10.0, -4.0
        assert_near(SigmoidPairLoss(**LOCAL)(*x), dense.sigmoid_pair_loss(*x))
