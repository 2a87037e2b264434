"""Ranks that each pass good input, but not of the same kind: a collective would hang, or end the process."""

import pytest
import torch
from cases import episode, unit
from rank_cases import rank_case
from ranks import everyone

from protoclip_losses import EpisodicClusterer, FeatureBank, InfoNCE, KMeans, OnlinePrototypes, ProtoLoss, TeacherAdapter


def raises_on_all(call):
    with pytest.raises((ValueError, TypeError)):
        call()
    assert everyone(torch.ones(1)).sum() == 2  # the group works afterwards


def filled_bank(rank, rows=6, **others):
    bank = FeatureBank(rows * rank + torch.arange(rows), 4)
    bank.update(bank.index, unit(rows, 4, rank), unit(rows, 4, rank + 2), **others)
    return bank


@rank_case(world_sizes=(2,), own_processes=True)
def features_that_are_none(rank, world_size, folder):
    raises_on_all(lambda: EpisodicClusterer(2).fit(unit(5, 3) if rank else None))
    raises_on_all(lambda: EpisodicClusterer(2).build(filled_bank(rank) if rank else None))


@rank_case(world_sizes=(2,), own_processes=True)
def other_widths(rank, world_size, folder):
    raises_on_all(lambda: InfoNCE()(unit(3, 4 + rank), unit(3, 4 + rank), 10.0))
    raises_on_all(lambda: EpisodicClusterer(2).fit(unit(5, 3 + rank)))
    raises_on_all(lambda: EpisodicClusterer(2).build(filled_bank(rank, audio=unit(6, 3 + rank))))


@rank_case(world_sizes=(2,), own_processes=True)
def other_types(rank, world_size, folder):
    dtype = (torch.float32, torch.float64)[rank]
    raises_on_all(lambda: InfoNCE()(unit(3, 4, dtype=dtype), unit(3, 4, dtype=dtype), 10.0))
    raises_on_all(lambda: EpisodicClusterer(2).fit(unit(5, 3, dtype=dtype)))


@rank_case(world_sizes=(2,), own_processes=True)
def other_modalities(rank, world_size, folder):
    bank = filled_bank(rank, audio=unit(6, 3)) if rank else filled_bank(rank)
    raises_on_all(lambda: EpisodicClusterer(2).build(bank))


@rank_case(world_sizes=(2,), own_processes=True)
def other_teachers(rank, world_size, folder):
    teachers = {"t": TeacherAdapter.from_tensor(unit(12, 3))} if rank else {}
    raises_on_all(lambda: EpisodicClusterer(2).build(filled_bank(rank), teachers))


@rank_case(world_sizes=(2,), own_processes=True)
def other_prototypes(rank, world_size, folder):
    loss, prototypes = ProtoLoss(), episode()
    loss.set_prototypes(prototypes if rank else None)
    raises_on_all(lambda: loss(unit(3, 5), unit(3, 5), 10.0, index=prototypes.index[:3]))


def names(setting, call):
    """The error on every rank names the setting and the values of both."""
    with pytest.raises(ValueError, match=rf"ranks must agree on .*{setting}.*, got .* on rank 0, .* on rank 1"):
        call()
    assert everyone(torch.ones(1)).sum() == 2


@rank_case(world_sizes=(2,), own_processes=True)
def other_settings_of_kmeans(rank, world_size, folder):
    x = unit(12, 3, rank)
    for name, values in {
        "niter": (5, 6),
        "nredo": (1, 2),
        "tol": (0.0, 0.1),
        "seed": (0, 1),
        "spherical": (False, True),
        "backend": ("torch", "faiss"),
        "max_dropped": (0.1, 0.2),
    }.items():
        names(name, lambda name=name, values=values: KMeans(2, **{name: values[rank]}).fit(x))
    names("num_clusters", lambda: KMeans(2 + rank).fit(x))
    names("num_prototypes", lambda: EpisodicClusterer(2 + rank).build(filled_bank(rank)))
    names("warm_start", lambda: EpisodicClusterer(2, warm_start=bool(rank)).build(filled_bank(rank)))


@rank_case(world_sizes=(2,), own_processes=True)
def other_settings_of_the_loss(rank, world_size, folder):
    x, prototypes = unit(3, 5, rank), episode()
    names("gather_with_grad", lambda: InfoNCE(gather_with_grad=bool(rank))(x, x, 10.0))
    for setting in (
        {"w_clip": rank},
        {"w_proto": 1 + rank},
        {"target_temperature": 0.1 + rank},
        {"back_translation": bool(rank)},
    ):
        loss = ProtoLoss(**setting)
        loss.set_prototypes(prototypes)
        names("settings", lambda loss=loss: loss(x, x, 10.0, index=prototypes.index[:3]))
    loss = ProtoLoss(chunk_size=1 + rank)  # blocks may differ
    loss.set_prototypes(prototypes)
    assert loss(x, x, 10.0, index=prototypes.index[:3]).isfinite()


@rank_case(world_sizes=(2,), own_processes=True)
def prototypes_that_were_built_apart(rank, world_size, folder):
    loss, prototypes = ProtoLoss(), episode(seed=rank)
    loss.set_prototypes(prototypes)
    names(
        "the checksum of the prototypes, which one build gives to all ranks",
        lambda: loss(unit(3, 5), unit(3, 5), 10.0, index=prototypes.index[:3]),
    )


@rank_case(world_sizes=(2,), own_processes=True)
def other_online_settings(rank, world_size, folder):
    x = unit(3, 5, rank)
    for name, value in {
        "num_prototypes": 2,
        "queue_size": 8,
        "every": 2,
        "warmup": 2,
        "calls_per_step": 1,
        "niter": 5,
        "seed": 0,
    }.items():
        setting = {name: value + rank}
        loss = ProtoLoss()
        loss.set_prototypes(OnlinePrototypes(**{"num_prototypes": 2, "queue_size": 8, "every": 2, "warmup": 2, **setting}))
        names(next(iter(setting)), lambda loss=loss: loss(x, x, 10.0))
    loss = ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(2, 8, 2, 2))
    loss.prototypes.step = rank
    names("step", lambda: loss(x, x, 10.0))
