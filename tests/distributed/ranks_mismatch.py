"""Ranks that each pass good input, but not of the same kind: a collective would hang, or end the process."""

import pytest
import torch
from cases import episode, unit
from rank_cases import rank_case
from ranks import everyone

from protoclip_losses import EpisodicClusterer, FeatureBank, InfoNCE, ProtoLoss, TeacherAdapter


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
