"""The paper's loop on several processes: gathered features, and the losses of all rows on every rank."""

import dense
import torch
from cases import assert_near, integers, leaf, unit
from rank_cases import rank_case
from ranks import everyone

from protoclip_losses.episodes import extract
from protoclip_losses.integrations.protoclip import ClipLoss, ProtoLoss, gather_features

B = 5


@rank_case(world_sizes=(2, 4))
def gradients_after_averaging_are_those_of_one_process(rank, world_size, folder):
    whole = [leaf(unit(B * world_size, 6, seed)) for seed in (1, 2)]
    P, C, labels = unit(4, 6, 3), unit(4, 9, 4), integers(4, B * world_size)
    scale = leaf(torch.tensor(10.0, dtype=torch.float64))
    proto = dense.prototype_cross_entropy(whole[0], P, labels, scale, C=C, temperature=0.1)
    wanted = dense.info_nce(*whole, scale) + proto
    wanted.backward()
    image, text = (leaf(x[rank * B : (rank + 1) * B]) for x in whole)
    own_scale = leaf(scale)
    everything = gather_features(image, text, False, False, rank, world_size, False)
    names = {"student_features": everything[0], "student_centroids": P, "teacher_centroids": C}
    value, _ = ProtoLoss()(**names, logit_scale_student=own_scale, teacher_temperature=0.1, labels=labels)
    loss = ClipLoss()(*everything, own_scale) + value
    loss.backward()
    assert_near(loss, wanted)
    assert_near(everyone(own_scale.grad).mean(), scale.grad)
    for own, x in ((image, whole[0]), (text, whole[1])):
        assert_near(own.grad / world_size, x.grad[rank * B : (rank + 1) * B])


@rank_case(world_sizes=(2, 4))
def extraction_takes_the_buffers_of_the_first_rank(rank, world_size, folder):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).train()
    model[1].eval()
    with torch.no_grad():
        model[0].running_mean.fill_(rank + 1.0)
    state = torch.get_rng_state()
    rows = unit(4, 3, dtype=torch.float32)
    bank = extract(model, [torch.arange(2), torch.arange(2, 4)], lambda i: (i + 4 * rank, model(rows[i]), torch.rand(2, 3)))
    assert_near(bank.features["image"], (rows - 1.0) / (1 + 1e-5) ** 0.5, 1e-5)
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert bank.index.tolist() == [4 * rank + i for i in range(4)]
    assert (everyone(model[0].running_mean) == 1).all()
