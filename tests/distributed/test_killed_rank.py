"""A rank that dies in the middle of K-means: the others get an error, and soon."""

import os
import time

import pytest
import spawn
import torch
from cases import unit

from protoclip_losses import KMeans
from protoclip_losses.clustering.lloyd import Lloyd


def a_rank_dies_in_kmeans(rank, world_size, folder):
    real = Lloyd._update

    def dying(self, changed):
        if rank == 1:
            os._exit(1)
        real(self, changed)

    Lloyd._update = dying
    start = time.monotonic()
    try:
        KMeans(6, backend="torch", tol=0).fit(unit(100, 4, rank, torch.float32))
    except RuntimeError as error:
        (folder / f"said.{rank}").write_text(f"{time.monotonic() - start:.1f} {error}")
        os._exit(0)


@pytest.mark.distributed
def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    spawn.run([f"{__file__}::{a_rank_dies_in_kmeans.__name__}"], 3, tmp_path, time_limit=90)
    said = [tmp_path / f"said.{rank}" for rank in range(3)]
    assert [file.exists() for file in said] == [True, False, True], [(tmp_path / f"log.{r}").read_text() for r in (0, 2)]
    assert all(float(file.read_text().split()[0]) < 75 for file in (said[0], said[2]))
