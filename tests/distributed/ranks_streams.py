"""Streams on several processes, each with shards of its own, against one process with all of them."""

import pytest
import torch
import torch.distributed as dist
from cases import unit
from rank_cases import rank_case
from ranks import LOCAL, assert_same_on_every_rank, raises_everywhere
from text_encoder import CAPTIONS, TextEncoder

from protoclip_losses import EpisodicClusterer, FeatureCollector, ProtoLoss, StreamEpisodes, TeacherAdapter
from protoclip_losses.distributed import even_batches
from protoclip_losses.episodes import extract

SIZES = {"a": 9, "b": 2, "c": 5, "d": 8, "e": 6}  # samples of each shard
FIRST = dict(zip(SIZES, (0, 9, 11, 16, 24), strict=True))
IMAGE, TEXT = unit(30, 4, 1, torch.float32), unit(30, 4, 2, torch.float32)


def read(shard):
    return [FIRST[shard] + row for row in range(SIZES[shard])]


def features(passing, encode):
    collector = FeatureCollector(dim=4)
    for index, rows in passing:
        teacher = {"t": encode([CAPTIONS[row] for row in rows.tolist()])}
        collector.update(index, IMAGE[rows], TEXT[rows], teacher_features=teacher)
    return collector


@rank_case
def ranks_with_shards_of_their_own_build_and_train_as_one(rank, world_size, folder):
    """Extraction and training of an episode, with unequal numbers of samples."""
    episode = StreamEpisodes(list(SIZES), 5, seed=1).episode(0)
    teacher = TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, folder / "s.npy", dim=6, progress=False)
    mine = features(episode.batches(read, int, 4, rank=rank, world_size=world_size), teacher.encode)
    every = features(episode.batches(read, int, 4), teacher.encode)
    assert len(every) == 30
    prototypes = EpisodicClusterer(3).build(mine.bank(), mine.teachers())
    alone = EpisodicClusterer(3, **LOCAL).build(every.bank(), every.teachers())
    assert torch.equal(prototypes.index, alone.index)
    for key, term in alone.terms.items():
        assert_same_on_every_rank(prototypes.terms[key].prototypes, prototypes.terms[key].labels)
        assert torch.allclose(prototypes.terms[key].prototypes, term.prototypes, atol=1e-5)
        assert torch.equal(prototypes.terms[key].labels, term.labels)
    loss, steps = ProtoLoss(), 0
    loss.set_prototypes(prototypes)
    for index, rows in even_batches(
        episode.batches(read, int, 4, rank=rank, world_size=world_size, shuffle_buffer=4, only=mine.index)
    ):
        assert torch.isfinite(loss(IMAGE[rows], TEXT[rows], 10.0, index=index))
        steps += 1
    assert_same_on_every_rank(torch.tensor(steps))
    assert steps > 0


@rank_case
def ranks_stop_with_the_first_that_has_no_batch(rank, world_size, folder):
    assert list(even_batches(range(rank + 2))) == [0, 1]
    assert list(even_batches([] if rank == world_size - 1 else [1])) == []
    assert list(even_batches(range(rank), process_group=False)) == list(range(rank))


@rank_case
def an_error_between_batches_raises_on_all(rank, world_size, folder):
    def batches():
        yield 1
        if rank == world_size - 1:
            raise OSError("shard is gone")
        yield 2

    raises_everywhere(lambda: list(even_batches(batches())), world_size - 1, OSError, "shard is gone")


@rank_case
def one_group_encodes_for_itself(rank, world_size, folder):
    """A process group, here each rank alone, makes and reads its own file."""
    encode = TextEncoder()
    path = folder / f"own{rank}.npy"
    TeacherAdapter.from_encoder(encode, CAPTIONS, path, dim=4, progress=False, process_group=False)
    assert encode.seen == CAPTIONS


@rank_case(world_sizes=(2, 4))
def a_file_that_one_rank_does_not_see_raises_on_all(rank, world_size, folder):
    """As on a second node without the first one's disk."""
    place = folder if rank == 0 else folder / "not_mounted"
    for dim in (None, 4):
        call = lambda dim=dim: TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, place / "m.npy", dim=dim, progress=False)  # noqa: E731
        with pytest.raises(FileNotFoundError if rank else ValueError, match=r"m\.npy" if rank else r"bad input on rank\(s\) \[1"):
            call()


@rank_case(world_sizes=(2, 4))
def a_pca_that_one_rank_does_not_see_raises_on_all(rank, world_size, folder):
    place = folder if rank == 0 else folder / "half_mounted"
    if rank == 1:
        place.mkdir()
        TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, place / "h.npy", dim=None, progress=False, process_group=False)
    elif rank > 1:
        place = folder
    with pytest.raises(
        FileNotFoundError if rank == 1 else ValueError, match=r"h\.npy\.pca" if rank == 1 else r"bad input on rank"
    ):
        TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, place / "h.npy", dim=4, progress=False)


@rank_case
def other_rows_under_the_same_name_raise_on_all(rank, world_size, folder):
    """As of an older cache on another node's disk: another encoder's rows of the same captions."""
    if world_size == 1:
        return
    own = folder / f"node{int(rank > 0)}"
    if rank < 2:
        encode = TextEncoder(seed=rank)
        TeacherAdapter.from_encoder(encode, CAPTIONS, own / "o.npy", dim=None, progress=False, process_group=False)
    dist.barrier()
    with pytest.raises(ValueError, match="ranks must agree on rows of the cache"):
        TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, own / "o.npy", dim=4, progress=False)


@rank_case
def captions_of_one_rank_that_are_others_raise_on_all(rank, world_size, folder):
    TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, folder / "c.npy", dim=None, progress=False)
    if world_size > 1:
        captions = CAPTIONS[::-1] if rank == world_size - 1 else CAPTIONS
        call = lambda: TeacherAdapter.from_encoder(TextEncoder(), captions, folder / "c.npy", progress=False)  # noqa: E731
        raises_everywhere(call, world_size - 1, ValueError, r"c\.npy was made from other texts")


@rank_case
def features_are_extracted_by_all_or_by_none(rank, world_size, folder):
    """A rank that has no batch gets an empty bank of the others' width; an error on one rank is raised on all."""
    model = torch.nn.Linear(4, 3)

    def project(rows):
        if rank == world_size - 1 and len(rows) == 2:
            raise OSError("picture is gone")
        return rows, model(IMAGE[rows]), model(TEXT[rows])

    mine = [] if rank == 1 else [torch.arange(5) + 5 * rank]
    bank = extract(model, mine, project)
    assert (len(bank), bank.dim) == (5 * len(mine), 3)
    assert EpisodicClusterer(2).build(bank).terms["image", "text"].prototypes.shape == (2, 3)
    raises_everywhere(lambda: extract(model, [torch.arange(2)], project), world_size - 1, OSError, "picture is gone")
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        extract(model, [], project)
    assert model.training


@rank_case
def a_single_caption_raises_on_all(rank, world_size, folder):
    raises_everywhere(
        lambda: TeacherAdapter.from_encoder(
            TextEncoder(), "a cat" if rank == world_size - 1 else CAPTIONS, folder / "x.npy", progress=False
        ),
        world_size - 1,
        TypeError,
        "texts must be a list of strings, got a single str",
    )
