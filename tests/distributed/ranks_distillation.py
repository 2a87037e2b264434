"""Relational distillation over ranks: after averaging, the gradients of one process on the whole batch."""

import dense
import torch
from cases import assert_near, leaf, unit
from rank_cases import rank_case
from ranks import SHARES, everyone, own_rows, raises_everywhere

from protoclip_losses import ProtoLoss, RelationalDistillation

TEACHER = unit(sum(SHARES), 7, 2)
TEACHER[::4] = 0
FEATURES = unit(sum(SHARES), 5, 1)


@rank_case
def the_share_of_relational_distillation_is_exact(rank, world_size, folder):
    total, rows = sum(SHARES[:world_size]), own_rows(rank)
    for teacher in (TEACHER[:total], torch.zeros(total, 7).double()):
        whole, whole_scale = leaf(FEATURES[:total]), leaf(torch.tensor(9.0, dtype=torch.float64))
        wanted = dense.relational_distillation(whole, teacher, whole_scale, 0.2)
        wanted.backward()
        for chunk_size in (None, 2):
            features, scale = leaf(whole[rows]), leaf(whole_scale)
            share = RelationalDistillation(0.2, chunk_size=chunk_size)(features, teacher[rows], scale)
            share.backward()
            assert_near(everyone(share).mean(), wanted)
            assert_near(everyone(scale.grad).mean(), whole_scale.grad)
            assert_near(features.grad / world_size, whole.grad[rows])


@rank_case(world_sizes=(2, 4))
def bad_distillation_on_one_rank_raises_on_all(rank, world_size, folder):
    teacher = TEACHER[own_rows(rank)]
    wrong = teacher[:-1] if rank == world_size - 1 else teacher
    loss, features = RelationalDistillation(), FEATURES[own_rows(rank)]
    raises_everywhere(lambda: loss(features, wrong, 9.0), world_size - 1, ValueError, "teacher_features must have")


@rank_case(world_sizes=(2, 4))
def the_share_of_distillation_in_the_objective_is_exact(rank, world_size, folder):
    total, rows = sum(SHARES[:world_size]), own_rows(rank)
    whole = [leaf(unit(total, 5, seed)) for seed in (3, 4)]
    wanted = sum(dense.relational_distillation(h, TEACHER[:total], 9.0, 0.1) for h in whole) / 2
    wanted.backward()
    loss = ProtoLoss(w_clip=0.0, w_distill=1.0)
    loss.set_prototypes(None)
    own = [leaf(x[rows]) for x in whole]
    share = loss(*own, 9.0, teacher_features={"t": TEACHER[rows]})
    share.backward()
    assert_near(everyone(share).mean(), wanted)
    for x, h in zip(own, whole, strict=True):
        assert_near(x.grad / world_size, h.grad[rows])
