"""open_clip's own loop on a DDP model: extraction, clustering and a step over two processes."""

import argparse

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("pandas")
import numpy as np
import open_clip
import torch
import torch.distributed as dist
from cases import assert_near, leaf, unit
from open_clip import ClipLoss
from open_clip_step import add_tiny_model, one_step, triples
from pair_files import emoji_with_groups
from rank_cases import rank_case
from ranks import assert_same_on_every_rank, everyone, own_rows
from torch.nn.parallel import DistributedDataParallel

from protoclip_losses import InfoNCE, OnlinePrototypes, ProjectionHeads, ProtoLoss, TeacherAdapter
from protoclip_losses.integrations.open_clip import add_heads, join_heads, parameter_names, separate_heads
from protoclip_losses.integrations.open_clip.online import load_state, save_state
from protoclip_losses.integrations.open_clip.teachers import read_teachers

SHARES = [7, 9]


def captions():
    return list(emoji_with_groups()[0].captions)[: sum(SHARES)]


@rank_case(world_sizes=(2,), own_processes=True)  # it leaves the group that torch.distributed.nn was imported with
def a_step_of_two_processes_is_that_of_one(rank, world_size, folder):
    configs = folder / f"configs.{rank}"
    configs.mkdir()
    add_tiny_model(configs)
    data = triples(sum(SHARES))
    rows = own_rows(rank, SHARES)
    own = torch.utils.data.Subset(data, range(rows.start, rows.stop))
    words = {"words": TeacherAdapter.from_captions(captions(), 8)}
    model = one_step(folder, own, wrap=DistributedDataParallel, teachers=words)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    dist.barrier()
    dist.destroy_process_group()
    whole = one_step(folder, data, teachers=words)
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


def online_arguments(folder, rank, world_size):
    checkpoints = folder / "verdicts"
    args = argparse.Namespace(logs=str(folder), checkpoint_path=str(checkpoints), rank=rank, world_size=world_size)
    args.resume = str(checkpoints / "epoch_1.pt")
    return args


@rank_case(world_sizes=(2,))
def what_one_rank_cannot_resume_is_an_error_on_all(rank, world_size, folder):
    """A damaged file, a state of another step: where one rank went on, it would wait for the other at the next clustering."""
    args = online_arguments(folder, rank, world_size)
    loss = new_online_loss()
    trained(loss, range(3), rank)
    save_state(loss, 1, args)
    own = folder / "verdicts" / f"epoch_1.online_{rank}_of_{world_size}"
    dist.barrier()
    kept = own.read_bytes()
    if rank == 1:
        own.write_bytes(kept[: len(kept) // 2])
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError), match="rank" if rank == 0 else None):
        load_state(new_online_loss(), 1, args)
    other = new_online_loss()
    if rank == 1:  # as if the file were of a later epoch: two ranks of a run killed while they saved
        other.prototypes.load_state_dict({**loss.prototypes.state_dict(), "step": 4})
        torch.save(other.get_extra_state(), own)
    dist.barrier()
    with pytest.raises(ValueError, match=r"ranks must agree on the step of the queue, got 3 on rank 0, 4 on rank 1"):
        load_state(new_online_loss(), 1, args)


@rank_case(world_sizes=(2,))
def what_one_rank_cannot_write_is_an_error_on_all(rank, world_size, folder):
    args = online_arguments(folder, rank, world_size)
    if rank == 1:
        blocked = folder / "a_file"
        blocked.write_text("")
        args.checkpoint_path = str(blocked / "checkpoints")
    loss = new_online_loss()
    trained(loss, range(3), rank)
    with pytest.raises(OSError if rank == 1 else ValueError, match=None if rank == 1 else r"bad input on rank\(s\) \[1\]"):
        save_state(loss, 1, args)


@rank_case(world_sizes=(2,))
def a_teacher_that_one_rank_does_not_have_is_an_error_on_all(rank, world_size, folder):
    file = folder / f"teacher.{rank}.npy"
    options = argparse.Namespace(proto_teacher=[("words", str(file))], proto_teacher_dim=2, proto_online=False)
    info = argparse.Namespace(shared_epoch=None, dataloader=argparse.Namespace(dataset=range(10)))
    if rank == 0:
        np.save(file, np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32))
    with pytest.raises((FileNotFoundError, ValueError), match=r"bad input on rank\(s\) \[1\]" if rank == 0 else "teacher.1.npy"):
        read_teachers(options, info)
    np.save(file, np.random.default_rng(0).normal(size=(10 + rank, 4)).astype(np.float32))
    with pytest.raises(ValueError, match="ranks must agree on words"):
        read_teachers(options, info)


class Table:
    """What is asked of open_clip's CsvDataset, whose pictures are not read here."""

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)


@rank_case(world_sizes=(2,))
def words_are_the_same_on_all_ranks_and_those_of_one_process(rank, world_size, folder):
    options = argparse.Namespace(proto_teacher=[("words", None)], proto_teacher_dim=6, proto_online=False)
    data = Table([*captions(), float("nan")])
    info = argparse.Namespace(shared_epoch=None, dataloader=argparse.Namespace(dataset=data))
    teacher, index = read_teachers(options, info)["words"], torch.arange(len(data))
    assert_same_on_every_rank(teacher[index])
    assert torch.equal(teacher[index], TeacherAdapter.from_captions([*captions(), ""], 6, process_group=False)[index])
    data.captions = data.captions[: len(data) - rank]
    with pytest.raises(ValueError, match="ranks must agree on texts"):
        read_teachers(options, info)


@rank_case(world_sizes=(2,))
def a_checkpoint_of_ddp_opens_in_ddp_without_heads(rank, world_size, folder):
    """Entries under ``module.``, as ``main`` saves them on several processes."""
    configs = folder / f"ddp.{rank}"
    configs.mkdir()
    add_tiny_model(configs)
    images, texts, _ = next(iter(torch.utils.data.DataLoader(triples(6), batch_size=6)))
    rows = own_rows(rank, [2, 4])

    def step(model):
        optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.ndim < n]} for n in (2,)], lr=0.1)
        optimizer.add_param_group({"params": [p for p in model.parameters() if p.ndim >= 2]})
        out = model(images[rows], texts[rows])
        sum(x.sum() for x in out.values()).backward()
        optimizer.step()
        return optimizer

    model = DistributedDataParallel(add_heads(open_clip.create_model("tiny", output_dict=True), 8, 16))
    optimizer = step(model)
    saved = {"epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    separate = separate_heads(saved, parameter_names(model, optimizer))
    plain = DistributedDataParallel(open_clip.create_model("tiny", output_dict=True))
    assert all(name.startswith("module.") for name in separate["state_dict"])
    assert len(separate["protoclip"]["heads"]) == len(model.module.proto.state_dict())
    plain.load_state_dict(separate["state_dict"])
    plain_optimizer = step(plain)
    plain_optimizer.load_state_dict(separate["optimizer"])
    by_name = {name: optimizer.state[p]["exp_avg"] for name, p in model.module.named_parameters() if p in optimizer.state}
    for name, p in plain.module.named_parameters():
        assert torch.equal(plain_optimizer.state[p]["exp_avg"], by_name[name]), name
    joined = join_heads(separate)
    assert list(joined["state_dict"]) == list(saved["state_dict"])
    model.load_state_dict(joined["state_dict"])
    optimizer.load_state_dict(joined["optimizer"])


@rank_case(world_sizes=(2,))
def a_rank_with_one_row_keeps_step_with_the_others(rank, world_size, folder):
    """Unequal last batches under DDP: BatchNorm of one row, and a gradient on every rank."""
    torch.manual_seed(0)
    heads = DistributedDataParallel(ProjectionHeads(6, 3, 8))
    rows = [5, 1]
    for sizes in (rows, rows[::-1], [1, 1]):
        z = unit(sizes[rank], 6, 10 + rank, torch.float32)
        out = heads(z, z)
        similarity = (out["image_features_projected"] * out["text_features_projected"].flip(1)).sum()
        (out["logit_scale_proto"] * similarity).backward()  # DDP waits for the gradient of every parameter
        gradients = [everyone(p.grad) for p in heads.parameters() if p.grad is not None]
        assert all(torch.equal(x[0], x[1]) and bool(x.isfinite().all()) for x in gradients)
        heads.zero_grad()
