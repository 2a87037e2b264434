"""A rank that dies in the middle of K-means: the others get an error, and soon."""

import os
import time

import torch
from cases import unit

from protoclip_losses import KMeans
from protoclip_losses.clustering import torch_engine


def a_rank_dies_in_kmeans(rank, world_size, folder):
    real = torch_engine._Lloyd._update

    def dying(self, changed):
        if rank == 1:
            os._exit(1)
        real(self, changed)

    torch_engine._Lloyd._update = dying
    start = time.monotonic()
    try:
        KMeans(6, backend="torch", tol=0).fit(unit(100, 4, rank, torch.float32))
    except RuntimeError as error:
        (folder / f"said.{rank}").write_text(f"{time.monotonic() - start:.1f} {error}")
        os._exit(0)


CASES = [a_rank_dies_in_kmeans]
