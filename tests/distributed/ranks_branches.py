"""Branches that lead to a collective and that one rank could take alone: an error on all ranks names what differs."""

import contextlib

import pytest
import torch
from cases import leaf, unit
from rank_cases import rank_case
from ranks import everyone

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss, RelationalDistillation, TeacherAdapter, extract


def names(what, call):
    with pytest.raises(ValueError, match=rf"ranks must agree on .*{what}.*, got .* on rank 0, .* on rank 1"):
        call()
    assert everyone(torch.ones(1)).sum() == 2  # the group works afterwards


def encode(captions):
    return torch.tensor([[float(len(caption)), 1.0, float(caption.count("a"))] for caption in captions])


CAPTIONS = [f"a {'very ' * i}small cat {i}" for i in range(8)]


@rank_case(world_sizes=(2,), own_processes=True)
def gradients_enabled_on_one_rank(rank, world_size, folder):
    """Only there would the prototypes take the batch in, and start K-means when warm-up ends."""
    x, loss = unit(6, 5, rank), ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(2, 12, every=2, warmup=1))
    with torch.no_grad() if rank else contextlib.nullcontext():
        names("torch.is_grad_enabled", lambda: loss(x, x, 10.0))
    assert loss.prototypes.step == 0


@rank_case(world_sizes=(2,), own_processes=True)
def features_that_need_a_gradient_on_one_rank(rank, world_size, folder):
    """The scale needs one on both, so that both go backward, and one of them alone would exchange the features' gradients."""
    x, scale = unit(6, 5, rank), leaf(torch.tensor(10.0))
    h = leaf(x) if rank else x
    names("requires_grad of each", lambda: RelationalDistillation()(h, x, scale).backward())
    names("requires_grad of each", lambda: InfoNCE(repeats="share")(h, x, scale, ids=torch.arange(6) // 2).backward())
    loss = ProtoLoss(w_distill=1.0)
    loss.set_prototypes(None)
    names("requires_grad of each", lambda: loss(x, x, scale, image_features_projected=h, teacher_features={"t": x}).backward())
    InfoNCE()(h, x, scale).backward()  # whose gradients are exchanged in forward


@rank_case(world_sizes=(2,), own_processes=True)
def a_teacher_of_other_settings(rank, world_size, folder):
    names("dim", lambda: TeacherAdapter.from_encoder(encode, CAPTIONS, folder / "dim.npy", dim=2 if rank else None))
    names("normalize", lambda: TeacherAdapter.from_encoder(encode, CAPTIONS, folder / "n.npy", dim=2, normalize=bool(rank)))
    pytest.importorskip("sklearn")
    names("cache", lambda: TeacherAdapter.from_captions(CAPTIONS, 2, folder / "words.npy" if rank else None))


@rank_case(world_sizes=(2,), own_processes=True)
def a_model_of_other_buffers(rank, world_size, folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2) if rank else torch.nn.Identity())
    loader = [(torch.arange(3), torch.ones(3, 4))]

    def project(batch):
        return batch[0], model(batch[1]), model(batch[1])

    names("the buffers of the model", lambda: extract(model, loader, project))
