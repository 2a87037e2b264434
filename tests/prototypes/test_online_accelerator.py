"""Online prototypes as an accelerator computes them, where no shape may depend on a value: those of a CPU."""

import pytest
import torch
from cases import assert_near, integers, unit

from protoclip_losses import OnlinePrototypes, ProtoLoss, _dtypes
from protoclip_losses.clustering.assign import nearest, nearest_without_waiting
from protoclip_losses.prototypes.cluster_sums import ClusterSums


@pytest.mark.parametrize("prototypes", [1, 5, 70, 300])
@pytest.mark.parametrize("rows", [0, 1, 400])
def test_labels_are_the_nearest_centroids(rows, prototypes):
    x, centroids = unit(rows, 6, 0, torch.float32), unit(prototypes, 6, 1, torch.float32)
    centroids[prototypes // 2 :] *= 1.5
    assert torch.equal(nearest_without_waiting(x, centroids), nearest(x, centroids, 1)[:, 0])


def test_the_lowest_id_among_equal_centroids():
    centroids = unit(9, 4, 1, torch.float32)[[0, 1, 2, 1, 0, 2, 1]]
    x = centroids + 1e-3 * unit(7, 4, 2, torch.float32)
    assert nearest_without_waiting(x, centroids).tolist() == [0, 1, 2, 1, 0, 2, 1]


def run(steps=9):
    loss = ProtoLoss(target_temperature=0.3)
    loss.set_prototypes(OnlinePrototypes(7, queue_size=60, every=3, warmup=2))
    losses = []
    for seed in range(steps):
        x = [unit(20, 5, 100 * seed + i).requires_grad_() for i in range(2)]
        x[0].data[3] = torch.nan if seed == 4 else x[0].data[3]
        teacher = unit(20, 9, 100 * seed + 7)
        teacher[seed] = 0
        loss.check_values = False
        losses.append(loss(*x, 10.0, teacher_features={"t": teacher}).detach())
    return torch.stack(losses), loss.prototypes


def test_steps_and_prototypes_are_those_of_a_cpu(monkeypatch):
    want, on_cpu = run()
    monkeypatch.setattr(_dtypes, "READABLE", set())
    got, on_accelerator = run()
    finite = want.isfinite()
    assert finite.sum() == len(want) - 1
    assert_near(got[finite], want[finite], 1e-6)
    for key, term in on_cpu.terms.items():
        assert torch.equal(term.valid, on_accelerator.terms[key].valid)
        assert_near(on_accelerator.terms[key].prototypes, term.prototypes, 1e-6)


def test_sums_leave_out_what_is_in_no_cluster():
    x, labels = unit(50, 4, 0), integers(5, 50) - 1
    x[7] = torch.inf
    sums = ClusterSums(4)
    for part in (slice(0, 20), slice(20, 50)):
        sums.add({"a": x[part], "b": 2 * x[part]}, {"a": labels[part]}, ["b"])
    counted = (labels >= 0) & x.isfinite().all(1)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 4).double()[counted]
    for key, factor in ((("a", "a"), 1), (("b", "a"), 2)):
        assert_near(sums.sums[key], torch.cat([factor * one_hot.T @ x[counted], one_hot.sum(0)[:, None]], 1))
    again = ClusterSums(4, sums.sums)
    assert torch.equal(again.sums["a", "a"], sums.sums["a", "a"])
