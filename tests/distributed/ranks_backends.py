"""Groups of other backends than gloo by its own name, meshes, and groups whose ranks hold the same samples."""

import copy
import warnings
from functools import partial

import dense
import pytest
import torch
import torch.distributed as dist
from cases import assert_near, episode, leaf, unit
from rank_cases import rank_case
from ranks import SHARES, own_rows
from reads import seen
from torch.distributed.device_mesh import init_device_mesh

from protoclip_losses import EpisodicClusterer, InfoNCE, KMeans, ProtoLoss, _checks
from protoclip_losses.distributed import RankRows, active_group, collective_device


def gloo_by_another_name(store, rank, world_size, timeout):
    return dist.ProcessGroupGloo(store, rank, world_size, timeout)


def registered(name, devices):
    if not hasattr(dist.Backend, name.upper()):
        dist.Backend.register_backend(name, gloo_by_another_name, devices=devices)
    return name


def is_exact(group, rank, world_size):
    """InfoNCE and K-means through the group, against one process on all rows."""
    total = sum(SHARES[:world_size])
    whole = [leaf(unit(total, 6, seed)) for seed in (1, 2)]
    wanted = dense.info_nce(*whole, 10.0)
    wanted.backward()
    own = [leaf(x[own_rows(rank)]) for x in whole]
    share = InfoNCE(process_group=group)(*own, 10.0)
    share.backward()
    for got, x in zip(own, whole, strict=True):
        assert_near(got.grad / world_size, x.grad[own_rows(rank)])
    x = unit(8 * world_size, 4, 7)
    clusters = KMeans(3, process_group=group).fit(x[8 * rank : 8 * rank + 8])
    assert torch.equal(clusters.centroids, KMeans(3, process_group=False).fit(x).centroids)


@rank_case(world_sizes=(2,))
def backends_of_any_name(rank, world_size, folder):
    for backend in ("gloo", "cpu:gloo", "cpu:gloo,cuda:gloo", registered("hostgloo", ["cpu"]), "cpu:hostgloo,cuda:gloo"):
        group = dist.new_group(list(range(world_size)), backend=backend)
        is_exact(group, rank, world_size)
        x = torch.arange(float(world_size))
        with seen() as found:  # what a backend of which nothing is known may lack, it is not asked for
            assert RankRows(group, [1] * world_size).sum_of_own(x) == world_size * x[rank]
        assert found.collectives == [("_collectives", "_reduced" if "hostgloo" in backend else "sum_of_own")]


@rank_case(world_sizes=(2,))
def a_tensor_stays_on_its_device_if_the_group_serves_it(rank, world_size, folder):
    cpu, second = torch.device("cpu"), torch.device("cuda", 1)
    both = dist.new_group(list(range(world_size)), backend="cpu:gloo,cuda:gloo")
    assert collective_device(both) == cpu
    assert collective_device(both, second) == second
    assert collective_device(both, torch.device("meta")) == cpu
    assert collective_device(dist.new_group(list(range(world_size)), backend="cpu:gloo"), second) == cpu
    without_cpu = dist.new_group(list(range(world_size)), backend="cuda:" + registered("cardgloo", ["cuda"]))
    assert collective_device(without_cpu, cpu, second) == second  # and not the present device, which is the first
    without_cpu.bound_device_id = second
    assert collective_device(without_cpu, cpu) == second


@rank_case(world_sizes=(2, 4))
def a_mesh_is_its_group(rank, world_size, folder):
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    for given in (mesh, mesh["dp"], mesh.get_group()):
        assert active_group(given) is active_group(mesh.get_group())
    is_exact(mesh, rank, world_size)
    loss = ProtoLoss(process_group=mesh)
    assert copy.deepcopy(loss).process_group is loss.process_group
    plane = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    for make in (InfoNCE, ProtoLoss, partial(KMeans, 2), partial(EpisodicClusterer, 2)):
        with pytest.raises(
            ValueError, match=r"one dimension of a DeviceMesh.*such as mesh\['dp'\], got a mesh with 2 dimensions"
        ):
            make(process_group=plane)
    with pytest.raises(ValueError, match=r"get_group\(0\).*\(1, 2\)|get_group\(0\).*\(2, 2\)"):
        InfoNCE(process_group=init_device_mesh("cpu", (world_size // 2, 2)))


def warnings_of(call):
    _checks.SAID.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(w.message) for w in caught if "hold the same samples" in str(w.message)]


@rank_case(world_sizes=(2, 4))
def ranks_that_hold_the_same_samples_are_told_once(rank, world_size, folder):
    """Pairs of ranks that share a model by tensors: the default group takes each sample for its own negative."""
    plane = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    pair, prototypes = rank // 2, episode(width=6)
    x, y = unit(5, 6, pair), unit(5, 6, pair + 10)
    index = prototypes.index[5 * pair : 5 * pair + 5]
    other = [unit(5, 6, 20 + rank), unit(5, 6, 30 + rank)]

    def proto_loss(features, index, **settings):
        loss = ProtoLoss(**settings)
        loss.set_prototypes(prototypes)
        return lambda: loss(*features, 10.0, index=index)

    same = ", ".join(map(str, range(world_size)))
    for call in (partial(InfoNCE(), x, y, 10.0), proto_loss([x, y], index), proto_loss(other, index)):
        told = warnings_of(call)
        assert len(told) == 1
        assert rf"ranks [{same}] of the process group" in told[0]
    everyone_elses = prototypes.index[5 * rank : 5 * rank + 5]
    for call in (
        partial(InfoNCE(), *other, 10.0),
        proto_loss(other, everyone_elses),
        proto_loss([x, y], index, process_group=plane["dp"]),
        partial(InfoNCE(process_group=plane["dp"]), x, y, 10.0),
    ):
        assert warnings_of(call) == []
    image, text = (torch.cat([unit(5, 6, p + shift) for p in range(world_size // 2)]) for shift in (0, 10))
    share = InfoNCE(process_group=plane["dp"])(x, y, 10.0)
    dist.all_reduce(share, group=plane["dp"].get_group())
    assert_near(share / (world_size // 2), dense.info_nce(image, text, 10.0))


@rank_case(world_sizes=(2,))
def no_more_is_exchanged_in_a_step_than_before(rank, world_size, folder):
    """The digest goes with the sizes: the first step has as many collectives as the second."""
    loss, counts = InfoNCE(), []
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss(unit(5, 6, rank), unit(5, 6, rank + 10), 10.0)
        counts.append(sum(e.count for e in profile.key_averages() if e.key.startswith(("c10d::", "gloo:"))))
    assert counts[0] == counts[1] > 0


@rank_case(world_sizes=(2,))
def a_group_of_a_device_alone_is_told_once(rank, world_size, folder):
    """Its steps exchange sizes over the device. There is none here, so that a step ends where it asks for it."""
    groups = {
        name: dist.new_group(list(range(world_size)), backend=name)
        for name in ("cuda:" + registered("cardgloo", ["cuda"]), "gloo")
    }
    _checks.SAID.clear()

    def told(group, **settings):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if group == "gloo":
                InfoNCE(process_group=groups[group], **settings)(unit(3, 4, rank), unit(3, 4), 10.0)
            else:
                with pytest.raises((AssertionError, RuntimeError)):
                    InfoNCE(process_group=groups[group], **settings)(unit(3, 4), unit(3, 4), 10.0)
        return [str(w.message) for w in caught if "waits for the device" in str(w.message)]

    assert told("gloo") == []
    assert told("cuda:cardgloo", equal_batch_sizes=True) == []
    (message,) = told("cuda:cardgloo")
    assert "init_process_group('cpu:gloo,cuda:cardgloo')" in message
    assert told("cuda:cardgloo") == []
