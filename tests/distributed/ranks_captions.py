"""The captions' own words as a teacher: one rank fits, all have the same rows."""

import pytest
import torch
from rank_cases import rank_case
from ranks import assert_same_on_every_rank, raises_everywhere

from protoclip_losses import TeacherAdapter

CAPTIONS = [f"{colour} {thing}" for colour in ("red", "blue", "old", "") for thing in ("cat", "dog", "bus", "car", "!")]


@rank_case
def every_rank_has_the_rows_of_one_process(rank, world_size, folder):
    alone = TeacherAdapter.from_captions(CAPTIONS, 3, process_group=False)
    every = torch.arange(len(CAPTIONS))
    for cache in (None, folder / "words.npy"):
        teacher = TeacherAdapter.from_captions(CAPTIONS, 3, cache, progress=False)
        assert torch.equal(teacher[every], alone[every])
        assert torch.equal(teacher.encode(["a red cat", "?"]), alone.encode(["a red cat", "?"]))
        assert_same_on_every_rank(teacher[every])


@rank_case(world_sizes=(2, 4))
def captions_that_differ_by_rank_raise_on_all(rank, world_size, folder):
    own = [*CAPTIONS[:-1], f"rank {rank}"]
    with pytest.raises(ValueError, match="ranks must agree on texts"):
        TeacherAdapter.from_captions(own, 3)
    with pytest.raises(ValueError, match=r"ranks must agree on dim, got 3 on rank 0, 4 on rank 1"):
        TeacherAdapter.from_captions(CAPTIONS, 3 + rank)
    bad = [1] if rank == world_size - 1 else CAPTIONS
    raises_everywhere(lambda: TeacherAdapter.from_captions(bad, 3), world_size - 1, TypeError, "texts")
    wordless = ["!"] * 3
    raises_everywhere(lambda: TeacherAdapter.from_captions(wordless, 3), 0, ValueError, "texts must hold words")
