"""open_clip's own loop on a DDP model: extraction, clustering and a step over two processes."""

import argparse

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("pandas")
import torch
import torch.distributed as dist
from cases import assert_near, leaf, unit
from open_clip import ClipLoss
from open_clip_step import add_tiny_model, one_step, triples
from rank_cases import rank_case
from ranks import everyone, own_rows
from torch.nn.parallel import DistributedDataParallel

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss
from protoclip_losses.integrations.open_clip.online import load_state, save_state

SHARES = [7, 9]


@rank_case(world_sizes=(2,), own_processes=True)  # it leaves the group that torch.distributed.nn was imported with
def a_step_of_two_processes_is_that_of_one(rank, world_size, folder):
    configs = folder / f"configs.{rank}"
    configs.mkdir()
    add_tiny_model(configs)
    data = triples(sum(SHARES))
    rows = own_rows(rank, SHARES)
    own = torch.utils.data.Subset(data, range(rows.start, rows.stop))
    model = one_step(folder, own, wrap=DistributedDataParallel)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    dist.barrier()
    dist.destroy_process_group()
    whole = one_step(folder, data)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    for name, p in whole.named_parameters():
        assert_near(gradients[name], p.grad, 1e-5)


@rank_case(world_sizes=(2,))
def losses_with_and_without_gather_with_grad_are_open_clips(rank, world_size, folder):
    """open_clip's default, and the flags with which it is exact: values, gradients of features and of the scale."""
    features = [unit(6, 5, 10 * rank + i) for i in range(2)]
    for gather in (False, True):
        theirs = ClipLoss(local_loss=gather, gather_with_grad=gather, rank=rank, world_size=world_size)
        proto = ProtoLoss(gather_with_grad=gather)
        proto.set_prototypes(None)
        results = []
        for loss in (theirs, InfoNCE(gather_with_grad=gather), proto):
            inputs = [*map(leaf, features), leaf(torch.tensor(10.0, dtype=torch.float64))]
            value = loss(*inputs)
            value.backward()
            results.append([everyone(value).mean(), inputs[0].grad, inputs[1].grad, everyone(inputs[2].grad).mean()])
        for ours in results[1:]:
            for got, wanted in zip(ours, results[0], strict=True):
                assert_near(got, wanted)


def trained(loss, steps, rank):
    for step in steps:
        image, text = (unit(4, 5, 100 * rank + 10 * step + i, torch.float32) for i in range(2))
        value = loss(leaf(image), text, 10.0)
    return value


def new_online_loss():
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(OnlinePrototypes(3, queue_size=16, every=2, warmup=2))
    return loss


@rank_case(world_sizes=(2,))
def each_rank_goes_on_with_its_own_queue(rank, world_size, folder):
    checkpoints = folder / "checkpoints"
    args = argparse.Namespace(logs=str(folder), checkpoint_path=str(checkpoints), rank=rank, world_size=world_size)
    args.resume = str(checkpoints / "epoch_1.pt")
    whole, rest = new_online_loss(), new_online_loss()
    trained(whole, range(3), rank)
    save_state(whole, 1, args)
    dist.barrier()
    load_state(rest, 1, args)
    values = [trained(loss, range(3, 6), rank) for loss in (whole, rest)]
    assert torch.equal(*values)
    # Where one rank has none, none goes on.
    (checkpoints / f"epoch_1.online_1_of_{world_size}").unlink(missing_ok=True)
    dist.barrier()
    alone = new_online_loss()
    load_state(alone, 1, args)
    assert alone.prototypes.step == 0
