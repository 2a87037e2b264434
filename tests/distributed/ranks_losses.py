"""Losses on several processes, each with its own rows, against one process on all rows."""

import copy
import warnings
from functools import partial

import dense
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import assert_near, episode, leaf, make_term, unit
from rank_cases import rank_case
from ranks import LOCAL, SHARES, assert_same_on_every_rank, everyone, own_rows, raises_everywhere
from torch.nn.parallel import DistributedDataParallel
from towers import towers

from protoclip_losses import (
    EpisodicClusterer,
    FeatureBank,
    InfoNCE,
    OnlinePrototypes,
    ProtoLoss,
    Prototypes,
    TeacherAdapter,
    _checks,
)
from protoclip_losses.distributed import active_group


def partly_ignored_episode(world_size):
    """Image, text and a teacher; one rank's samples have no label from text, and every third none from the teacher."""
    whole = episode(teachers=("t",), samples=40, empty=(2,))
    place = torch.arange(40)
    rows_without = {"text": (place >= 5) & (place < 6) if world_size > 1 else place == 3, "t": place % 3 == 0, "image": place < 0}
    return Prototypes(
        whole.index,
        {
            (student, teacher): make_term(
                term.prototypes, term.teacher_centroids, term.labels.masked_fill(rows_without[teacher], -1), term.valid
            )
            for (student, teacher), term in whole.terms.items()
        },
    )


@rank_case
def the_share_of_info_nce_is_exact(rank, world_size, folder):
    """Mean over ranks of the loss, and gradients of rows and scale, against the dense form of the whole batch."""
    total = sum(SHARES[:world_size])
    whole = [leaf(unit(total, 6, seed)) for seed in (1, 2)]
    whole_scale = leaf(torch.tensor(10.0, dtype=torch.float64))
    wanted = dense.info_nce(*whole, whole_scale)
    wanted.backward()
    for chunk_size in (None, 2):
        image, text = (leaf(x[own_rows(rank)]) for x in whole)
        scale = leaf(whole_scale)
        share = InfoNCE(chunk_size=chunk_size)(image, text, scale)
        share.backward()
        assert_near(everyone(share).mean(), wanted)
        assert_near(everyone(scale.grad).mean(), whole_scale.grad)
        for own, x in ((image, whole[0]), (text, whole[1])):
            assert_near(own.grad / world_size, x.grad[own_rows(rank)])


@rank_case
def without_gradients_of_the_gather_other_ranks_features_are_constants(rank, world_size, folder):
    """InfoNCE of the whole batch in which own rows alone are leaves; the scale and the prototype terms are exact all the same."""
    total = sum(SHARES[:world_size])
    whole = [unit(total, 6, seed) for seed in (1, 2)]
    own = [leaf(x[own_rows(rank)]) for x in whole]
    rows = own_rows(rank)
    seen = [torch.cat([x[: rows.start], here, x[rows.stop :]]) for x, here in zip(whole, own, strict=True)]
    scale = leaf(torch.tensor(10.0, dtype=torch.float64))
    wanted = torch.autograd.grad(dense.info_nce(*seen, scale), [*own, scale])
    prototypes = episode(samples=40, width=6)
    index = prototypes.index[:total][rows]
    gradients = {}
    for gather in (True, False):
        share = InfoNCE(gather_with_grad=gather)(*own, scale)
        assert_near(everyone(share).mean(), dense.info_nce(*whole, 10.0))
        *features, of_scale = torch.autograd.grad(share, [*own, scale])
        assert_near(everyone(of_scale).mean(), wanted[2])
        for got, x in zip(features, wanted, strict=False):
            assert_near(got, x if not gather else x * world_size)
        loss = ProtoLoss(gather_with_grad=gather)
        loss.set_prototypes(prototypes)
        parts = loss(*own, scale, index=index, output_dict=True)
        gradients[gather] = {name: torch.autograd.grad(x, own, retain_graph=True) for name, x in parts.items()}
    for i in range(2):
        assert_near(gradients[False]["contrastive_loss"][i], wanted[i])
        assert_near(gradients[False]["proto_loss"][i], gradients[True]["proto_loss"][i])


@rank_case
def a_text_that_is_near_no_image_is_exact(rank, world_size, folder):
    """Column normalisers 200 below the rows': each column needs its own exponentials, and every rank must see that it does."""
    total = sum(SHARES[:world_size])
    near = unit(1, 6, 1) + 0.1 * unit(total, 6, 2)
    text = torch.cat([near[:-1] + 0.1 * unit(total - 1, 6, 3), -unit(1, 6, 1)])
    whole = [leaf(F.normalize(x, dim=1)) for x in (near, text)]
    whole_scale = leaf(torch.tensor(100.0, dtype=torch.float64))
    wanted = dense.info_nce(*whole, whole_scale)
    wanted.backward()
    image, text = (leaf(x[own_rows(rank)]) for x in whole)
    scale = leaf(whole_scale)
    share = InfoNCE()(image, text, scale)
    share.backward()
    assert_near(everyone(share).mean(), wanted)
    assert_near(everyone(scale.grad).mean(), whole_scale.grad)
    for own, x in ((image, whole[0]), (text, whole[1])):
        assert_near(own.grad / world_size, x.grad[own_rows(rank)])


@rank_case
def the_share_of_every_part_is_exact(rank, world_size, folder):
    """Internal and external terms, ignored labels differing from rank to rank; one rank may have none that counts."""
    prototypes = partly_ignored_episode(world_size)
    total = sum(SHARES[:world_size])
    index = prototypes.index[:total]
    whole = [leaf(unit(total, 5, seed)) for seed in (1, 2, 3, 4)]
    twin = dense.objective(
        whole[:2], {"image": whole[2], "text": whole[3]}, 10.0, 5.0, prototypes, index, temperature=0.1, w_external=0.5
    )
    sum(twin.values()).backward()
    own = [leaf(x[own_rows(rank)]) for x in whole]
    loss = ProtoLoss(target_temperature=0.1, w_external=0.5)
    loss.set_prototypes(prototypes)
    parts = loss(
        own[0],
        own[1],
        10.0,
        image_features_projected=own[2],
        text_features_projected=own[3],
        logit_scale_proto=5.0,
        index=index[own_rows(rank)],
        output_dict=True,
    )
    sum(parts.values()).backward()
    for name, value in twin.items():
        assert_near(everyone(parts[name]).mean(), value)
    for x, all_rows in zip(own, whole, strict=True):
        assert_near(x.grad / world_size, all_rows.grad[own_rows(rank)])


@rank_case
def a_term_in_which_no_sample_counts_is_zero(rank, world_size, folder):
    term = make_term(torch.eye(3), torch.eye(3), torch.full((8,), -1), torch.ones(3, dtype=torch.bool))
    loss = ProtoLoss(w_clip=0)
    loss.set_prototypes(Prototypes(torch.arange(8), {("image", "t"): term}))
    h = leaf(unit(2, 3))
    value = loss(h, h, 10.0, index=torch.tensor([rank, rank + 1]))
    value.backward()
    assert float(value) == 0
    assert (h.grad == 0).all()


@rank_case
def online_prototypes_are_those_of_one_process(rank, world_size, folder):
    """Equal shares of a batch, and a queue that they divide: the same terms, losses and gradients."""
    whole, own = ProtoLoss(target_temperature=0.1, **LOCAL), ProtoLoss(target_temperature=0.1)
    settings = {"num_prototypes": 4, "queue_size": 32, "every": 3, "warmup": 2}
    for loss in (whole, own):
        loss.set_prototypes(OnlinePrototypes(**settings))
    rows = slice(8 * rank // world_size, 8 * (rank + 1) // world_size)
    for step in range(9):
        image, text = (unit(8, 6, 10 * step + side, torch.float32) for side in (1, 2))
        full, part = leaf(image), leaf(image[rows])
        value = whole(full, text, 10.0)
        share = own(part, text[rows], 10.0)
        value.backward()
        share.backward()
        assert_near(everyone(share).mean(), value)
        assert_near(part.grad / world_size, full.grad[rows])
    for key, term in whole.prototypes.terms.items():
        for name in ("prototypes", "teacher_centroids"):
            assert_near(getattr(own.prototypes.terms[key], name), getattr(term, name))


def train_like_one_process(model, make_loss, modes, rank, world_size, index, tolerance):
    """Several steps of DDP on own rows and of one process on all rows: loss, gradients and weights stay the same."""
    total = len(index)
    ours = DistributedDataParallel(copy.deepcopy(model))  # find_unused_parameters=False
    loss, whole_loss = make_loss(), make_loss(**LOCAL)
    trained, reference = ours.module, model
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (trained, reference)]
    dtype = model.logit_scale.dtype
    for step, mode in enumerate(modes):
        inputs = [unit(total, 7, 10 * step + side, dtype) for side in (1, 2)]
        own = own_rows(rank)
        mode(loss), mode(whole_loss)
        keywords = {"index": index} if isinstance(loss, ProtoLoss) else {}
        share = loss(**ours(*(x[own] for x in inputs)), **{k: v[own] for k, v in keywords.items()})
        wanted = whole_loss(**reference(*inputs), **keywords)
        assert_near(everyone(share).mean(), wanted, tolerance)
        for value, optimizer in ((share, optimizers[0]), (wanted, optimizers[1])):
            optimizer.zero_grad()
            value.backward()
        # A layer whose gradient is small beside the others carries their rounding.
        size = float(torch.cat([p.grad.flatten() for p in reference.parameters() if p.requires_grad]).norm())
        for (name, p), q in zip(trained.named_parameters(), reference.parameters(), strict=True):
            if p.requires_grad:
                error = float((p.grad - q.grad).norm())
                assert error <= tolerance * max(float(q.grad.norm()), 0.01 * size), f"step {step}, {name}: {error}"
        assert float(trained.logit_bias.grad) == 0
        for optimizer in optimizers:
            optimizer.step()
    assert_same_on_every_rank(*trained.state_dict().values())


def warm_up(loss):
    loss.set_prototypes(None)


def episodes_of(prototypes):
    return lambda loss: loss.set_prototypes(prototypes)


@rank_case
def info_nce_under_ddp(rank, world_size, folder):
    total = sum(SHARES[:world_size])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        for lit in (False, True):
            model = towers(heads=False, dtype=dtype, lit=lit)
            modes = [lambda loss: None] * 2
            train_like_one_process(model, InfoNCE, modes, rank, world_size, torch.arange(total), tolerance)


@rank_case
def proto_loss_under_ddp_from_warm_up_to_lit(rank, world_size, folder):
    """Modes follow each other with find_unused_parameters=False; heads and their scale are unused in warm-up and LiT."""
    prototypes = partly_ignored_episode(world_size)
    index = prototypes.index[: sum(SHARES[:world_size])]
    train = episodes_of(prototypes)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        make_loss = partial(ProtoLoss, target_temperature=0.1, w_external=0.5)
        model = towers(heads=True, dtype=dtype)
        train_like_one_process(model, make_loss, [warm_up, train, train, warm_up, train], rank, world_size, index, tolerance)
        model = towers(heads=True, dtype=dtype, lit=True)
        train_like_one_process(model, make_loss, [train, warm_up, warm_up], rank, world_size, index, tolerance)


@rank_case
def weights_of_zero_under_ddp(rank, world_size, folder):
    prototypes = partly_ignored_episode(world_size)
    index = prototypes.index[: sum(SHARES[:world_size])]
    for weights in ({"w_clip": 0}, {"w_proto": 0}, {"w_external": 0}, {"w_clip": 0, "w_proto": 0, "w_external": 0}):
        model = towers(heads=True, dtype=torch.float64)
        modes = [episodes_of(prototypes)] * 2
        train_like_one_process(model, partial(ProtoLoss, **weights), modes, rank, world_size, index, 1e-10)


@rank_case
def process_group_false_talks_to_nobody(rank, world_size, folder):
    """Rank 0 alone evaluates and clusters; a collective would wait for the others, who never come."""
    if rank == 0:
        z, prototypes = unit(6, 5), episode(teachers=("t",))
        assert_near(InfoNCE(**LOCAL)(z, z, 10.0), dense.info_nce(z, z, 10.0))
        loss = ProtoLoss(**LOCAL)
        loss.set_prototypes(prototypes)
        twin = dense.objective((z, z), {"image": z, "text": z}, 10.0, 10.0, prototypes, prototypes.index[:6])
        assert_near(loss(z, z, 10.0, index=prototypes.index[:6]), sum(twin.values()))
        EpisodicClusterer(3, **LOCAL).fit(unit(20, 4))
        bank = FeatureBank(torch.arange(20), 4)
        bank.update(torch.arange(20), unit(20, 4, 1), unit(20, 4, 2))
        EpisodicClusterer(3, **LOCAL).build(bank, [TeacherAdapter.from_tensor(unit(20, 6))])


@rank_case
def bad_input_on_one_rank_raises_on_all(rank, world_size, folder):
    bad = world_size - 1
    z, prototypes = unit(4, 5, rank), episode(teachers=("t",))
    index = prototypes.index[4 * rank : 4 * rank + 4]
    loss = ProtoLoss()
    loss.set_prototypes(prototypes)

    def info_nce(**change):
        return InfoNCE()(**{"image_features": z, "text_features": z, "logit_scale": 10.0, **(change if rank == bad else {})})

    def proto_loss(**change):
        good = {"image_features": z, "text_features": z, "logit_scale": 10.0, "index": index}
        return loss(**{**good, **(change if rank == bad else {})})

    unset = ProtoLoss()
    if rank != bad:
        unset.set_prototypes(prototypes)
    for call, error, message in [
        (partial(info_nce, image_features=z * torch.nan), ValueError, "image_features must be finite"),
        (partial(info_nce, text_features=z[:, :3]), ValueError, "text_features must have width 5"),
        (partial(info_nce, text_features=z[:3]), ValueError, "text_features must have 4 rows"),
        (partial(info_nce, image_features=None), TypeError, "image_features must be a torch.Tensor"),
        (partial(info_nce, image_features=torch.tensor(1.0)), ValueError, "image_features must have 2 dimensions"),
        (partial(info_nce, logit_scale=torch.inf), ValueError, "logit_scale must be finite"),
        (partial(proto_loss, image_features=z * torch.nan), ValueError, "image_features.* must be finite"),
        (partial(proto_loss, image_features=None), TypeError, "image_features must be a torch.Tensor"),
        (partial(proto_loss, image_features=torch.tensor(1.0)), ValueError, "image_features must have 2 dimensions"),
        (partial(proto_loss, index=index + 1000), IndexError, "4 of 4 are not in it"),
        (partial(proto_loss, index=None), ValueError, "index must be given"),
        (partial(proto_loss, image_features_projected=unit(4, 6)), ValueError, "must have width 5"),
        (partial(proto_loss, logit_scale_proto="x"), TypeError, "logit_scale_proto must be a float"),
        (lambda: unset(z, z, 10.0, index=index), RuntimeError, "prototypes are not set"),
    ]:
        raises_everywhere(call, bad, error, message)
        assert info_nce().isfinite()
        assert proto_loss().isfinite()


@rank_case
def a_group_of_some_ranks_is_a_world_of_its_own(rank, world_size, folder):
    members = list(range(1, world_size)) or [0]
    group = dist.new_group(members)
    setting = {"process_group": group}
    if rank not in members:
        for call in (
            lambda: InfoNCE(**setting)(unit(3, 4), unit(3, 4), 1.0),
            lambda: EpisodicClusterer(3, **setting).fit(unit(9, 4)),
        ):
            with pytest.raises(ValueError, match="process_group does not contain this rank"):
                call()
        return
    shares = [4, 2, 3][: len(members)]
    own, total = own_rows(members.index(rank), shares), sum(shares)
    image, text, prototypes = unit(total, 5, 1), unit(total, 5, 2), episode(teachers=("t",))
    index = prototypes.index[:total]
    shares_of_loss = []
    for make in (InfoNCE, ProtoLoss):
        loss, whole = make(**setting), make(**LOCAL)
        keywords = {}
        if make is ProtoLoss:
            loss.set_prototypes(prototypes), whole.set_prototypes(prototypes)
            keywords = {"index": index}
        value = loss(image[own], text[own], 10.0, **{k: v[own] for k, v in keywords.items()})
        dist.all_reduce(value, group=group)
        assert_near(value / len(members), whole(image, text, 10.0, **keywords))
        shares_of_loss.append(value)
    x = unit(10 * len(members), 4, 7)
    clusters = EpisodicClusterer(3, **setting).fit(x[own_rows(members.index(rank), [10] * len(members))])
    assert torch.equal(clusters.centroids, EpisodicClusterer(3, **LOCAL).fit(x).centroids)


@rank_case
def a_group_of_one_is_one_process(rank, world_size, folder):
    groups = [dist.new_group([r]) for r in range(world_size)]
    assert active_group(groups[rank]) is None
    assert (active_group(None) is None) == (world_size == 1)
    image, text = unit(rank + 2, 4, 1), unit(rank + 2, 4, 2)
    assert_near(InfoNCE(process_group=groups[rank])(image, text, 10.0), dense.info_nce(image, text, 10.0))


@rank_case
def a_copy_of_a_loss_communicates_with_the_same_group(rank, world_size, folder):
    group = dist.new_group(list(range(world_size)))
    whole = unit(sum(SHARES[:world_size]), 4)
    x = whole[own_rows(rank)]
    for module in (InfoNCE(process_group=group), ProtoLoss(process_group=group)):
        if isinstance(module, ProtoLoss):
            module.set_prototypes(None)
        other = copy.deepcopy(module)
        assert other.process_group is group
        assert torch.equal(other(x, x, 10.0), module(x, x, 10.0))


@rank_case
def repeated_captions_are_known_over_all_ranks(rank, world_size, folder):
    total, rows = sum(SHARES[:world_size]), own_rows(rank)
    ids = torch.arange(total) % 4  # each id on several ranks
    for repeats in ("mask", "share"):
        whole = [leaf(unit(total, 6, seed)) for seed in (1, 2)]
        whole_scale = leaf(torch.tensor(10.0, dtype=torch.float64))
        wanted = dense.info_nce_of_repeats(*whole, whole_scale, ids, repeats)
        wanted.backward()
        image, text = (leaf(x[rows]) for x in whole)
        scale = leaf(whole_scale)
        share = InfoNCE(repeats=repeats, chunk_size=2)(image, text, scale, ids=ids[rows])
        share.backward()
        assert_near(everyone(share).mean(), wanted)
        assert_near(everyone(scale.grad).mean(), whole_scale.grad)
        for own, x in ((image, whole[0]), (text, whole[1])):
            assert_near(own.grad / world_size, x.grad[rows])


@rank_case
def a_rank_says_what_it_sees_in_its_own_rows(rank, world_size, folder):
    """A window ends for all ranks together; what is the same on all of them is said by the first."""
    samples, eight = torch.arange(80), torch.eye(8)
    term = make_term(eight, eight, samples % 8, torch.ones(8, dtype=torch.bool))
    loss = ProtoLoss(target_temperature=None)
    loss.set_prototypes(Prototypes(samples, {("image", "text"): term}))
    loss._terms.watch.calls = 100  # of a training that has long begun
    is_last = rank == world_size - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _checks.SAID.clear()
        for _ in range(4):
            for rows in samples[rank::world_size].split(5):
                h = eight[rows % 8]
                loss(h, h, 10.0, logit_scale_proto=0.02 if is_last else 2.0, index=rows)
        _checks.SAID.clear()
    messages = [str(warning.message) for warning in caught]
    assert [message for message in messages if "more than 3 times the samples" in message] == messages[-1:] * (rank == 0)
    assert len([message for message in messages if "within 1% of log K" in message]) == is_last
