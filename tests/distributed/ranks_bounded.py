"""Clusters of bounded size on several processes, each with its own rows, against all rows at once."""

import pytest
import torch
from cases import unit
from rank_cases import rank_case
from ranks import LOCAL, assert_same_on_every_rank, own_rows

from protoclip_losses import KMeans


@rank_case
def clusters_of_bounded_size_are_those_of_one_process(rank, world_size, folder):
    shares = {1: [150], 2: [119, 31], 4: [70, 1, 0, 79]}[world_size]
    x = torch.cat([unit(90, 5, 5, torch.float32), unit(20, 5, 6, torch.float32).repeat(3, 1)])
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    rows = own_rows(rank, shares)
    for settings in ({}, {"spherical": True}, {"backend": "faiss"}):
        for index in (None, order):
            kmeans = {"num_clusters": 15, "max_cluster_size": 10, **settings}
            whole = KMeans(**kmeans, **LOCAL).fit(x, index=index)
            own = KMeans(**kmeans).fit(x[rows], index=None if index is None else index[rows])
            assert own.counts.tolist() == [10] * 15
            assert torch.equal(own.labels, whole.labels[rows])
            assert torch.allclose(own.centroids, whole.centroids, atol=1e-5)
            assert own.objective == pytest.approx(whole.objective)
            assert own.report.not_nearest == whole.report.not_nearest
            assert_same_on_every_rank(own.centroids, own.counts)


@rank_case(world_sizes=(2,))
def a_bound_must_be_the_same_on_all_ranks_and_leave_room(rank, world_size, folder):
    x = unit(20, 3, 1, torch.float32)
    with pytest.raises(ValueError, match="ranks must agree on max_cluster_size, got 10 on rank 0, 11 on rank 1"):
        KMeans(5, max_cluster_size=10 + rank).fit(x)
    with pytest.raises(ValueError, match="max_cluster_size must be at least 8 for 40 finite rows in num_clusters=5"):
        KMeans(5, max_cluster_size=7).fit(x)
