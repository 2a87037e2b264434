"""ProtoCLIPCallback on two processes of Lightning's DDP."""

import os
import shutil

import pytest

pytest.importorskip("lightning")
import torch
import torch.distributed as dist
from cases import assert_near
from host_lightning import Clip
from host_pairs import PicturePairs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fit import Counting, fit
from rank_cases import rank_case
from ranks import assert_same_on_every_rank, everyone, raises_everywhere
from torch.utils.data import DataLoader

from protoclip_losses import EpisodeOrder, EpisodeSampler, EpisodicClusterer, ProtoLoss, TeacherAdapter, WithIndex

on_two_processes = rank_case(world_sizes=(2,), own_processes=True)


def fit_together(folder, loader, callback, **options):
    """A fit by DDP, as torchrun would start it."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size, GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", TORCHELASTIC_RUN_ID="rank case")
    return fit(folder, loader, callback, devices=int(world_size), strategy="ddp", **options)


def assert_same_parameters(model):
    assert_same_on_every_rank(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


@on_two_processes
def the_default_number_of_prototypes_is_that_of_all_ranks(rank, world_size, folder):
    """99 samples are 50 and 49: K is 9 on both, whichever sampler spreads them."""
    pairs = WithIndex(PicturePairs(99))
    for loader in (
        DataLoader(pairs, 25, shuffle=True),
        DataLoader(pairs, 25, sampler=EpisodeOrder(EpisodeSampler(99, 99))),
    ):
        callback = Counting(warmup_epochs=0)
        model, seen = fit_together(folder / "number", loader, callback, max_epochs=2)
        assert callback.builds == 2
        assert model.loss.prototypes.index.tolist() == list(range(99))
        assert model.loss.prototypes.terms["image", "text"].prototypes.shape[0] == 9
        samples = everyone(torch.tensor(seen.samples)).T.reshape(2, -1)
        assert all(set(epoch.tolist()) == set(range(99)) for epoch in samples)
        assert_same_parameters(model)


class WithSGD(Clip):
    """Adam makes whole steps of the rounding of gradients that are zero."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@on_two_processes
def two_processes_end_where_one_does(rank, world_size, folder):
    """The process that is alone has both ranks' batches as one; the other one does the same work."""
    pairs, ends = WithIndex(PicturePairs(40)), []
    for world in (2, 1):
        torch.manual_seed(0)
        model = WithSGD()
        model.loss.process_group = None if world == 2 else False
        loader = DataLoader(pairs, 10 // world, sampler=EpisodeOrder(EpisodeSampler(40, 40), rank % world, world))
        train = fit_together if world == 2 else fit
        train(folder / str(world), loader, Counting(4), model=model, use_distributed_sampler=False)
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    for name, x in ends[1].items():
        assert_near(ends[0][name], x, 1e-4)


@on_two_processes
def an_episode_that_lightning_spreads_over_the_ranks_is_the_one_that_is_extracted(rank, world_size, folder):
    pairs = WithIndex(PicturePairs(40))
    loader = DataLoader(pairs, 5, sampler=EpisodeOrder(EpisodeSampler(40, 20)))
    model, seen = fit_together(folder / "spread", loader, Counting(warmup_epochs=0))
    episode = EpisodeSampler(40, 20).episode(1).index.sort().values
    assert torch.equal(model.loss.prototypes.index, episode)
    assert set(everyone(torch.tensor(seen.samples[10:])).flatten().tolist()) == set(episode.tolist())


@on_two_processes
def a_teacher_that_does_not_fit_on_one_rank_is_an_error_on_both(rank, world_size, folder):
    teachers = {"words": TeacherAdapter.from_tensor(torch.randn(40 - rank, 5))}
    loader = DataLoader(WithIndex(PicturePairs(40)), 10)
    callback = Counting(4, teachers=teachers)
    raises_everywhere(
        lambda: fit_together(folder / "teacher", loader, callback), 1, ValueError, "a row for each of the 40 samples"
    )


@on_two_processes
def checkpoints_that_differ_between_machines_are_an_error_on_both(rank, world_size, folder):
    """One has the state of the callback and the other has not: one would cluster alone."""
    folder, loader = folder / "differ", DataLoader(WithIndex(PicturePairs(40)), 10, shuffle=True)
    saves = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit_together(folder, loader, Counting(4), callbacks=[saves], enable_checkpointing=True)
    dist.barrier()
    own = folder / f"{rank}.ckpt"
    shutil.copy(folder / "step=3.ckpt", own)
    if rank == 1:
        state = torch.load(own, weights_only=True)
        del state["callbacks"]["Counting"]
        torch.save(state, own)
    with pytest.raises(ValueError, match="ranks must agree on the epoch of the prototypes, got 1 on rank 0, -1 on rank 1"):
        fit_together(folder, loader, Counting(4), model=Clip(), resume=own)


@on_two_processes
def words_that_each_process_clusters_are_those_of_both_and_of_a_resumed_fit(rank, world_size, folder):
    pytest.importorskip("sklearn")
    pairs, folder = PicturePairs(40), folder / "words"
    alone = {"process_group": False}  # as before the Trainer has joined the processes
    clusters = EpisodicClusterer(4, **alone).fit_teacher(TeacherAdapter.from_captions(pairs.captions, 8, **alone))
    loader = DataLoader(WithIndex(pairs), 10, sampler=EpisodeOrder(EpisodeSampler(40, 40)))
    ends = []
    for resume in (None, folder / "step=4.ckpt"):
        saves = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callback, model = Counting(4, teachers={"words": clusters}), WithSGD()
        model.loss = ProtoLoss(w_proto=0.0)
        options = {"model": model, "resume": resume, "max_epochs": 3, "callbacks": [saves], "enable_checkpointing": True}
        model, _ = fit_together(folder, loader, callback, **options)
        assert callback.builds == (2 if resume is None else 1)
        assert torch.equal(model.loss.prototypes.labels_by_teacher["words"], clusters.labels)
        assert_same_parameters(model)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert [name for name, x in ends[0].items() if not torch.equal(x, ends[1][name])] == []
