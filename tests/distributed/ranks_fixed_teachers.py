"""Teachers clustered once, over ranks: all get the labels of all samples, and the prototypes of one process."""

import pytest
import torch
from cases import unit
from rank_cases import rank_case
from ranks import LOCAL, assert_same_on_every_rank, own_rows

from protoclip_losses import EpisodicClusterer, FeatureBank, TeacherAdapter
from protoclip_losses.prototypes import Clustering

N = 50
ROWS = unit(N, 5, 1, torch.float32)
ROWS[::9] = 0
IMAGE, TEXT = unit(N, 4, 2, torch.float32), unit(N, 4, 3, torch.float32)


def bank_of(index):
    return FeatureBank.from_features(index, image=IMAGE[index], text=TEXT[index])


@rank_case
def ranks_cluster_a_teacher_and_build_as_one(rank, world_size, folder):
    teacher = TeacherAdapter.from_tensor(ROWS)
    for several in (1, 2):
        clustering = EpisodicClusterer(6, labels_per_sample=several).fit_teacher(teacher)
        alone = EpisodicClusterer(6, labels_per_sample=several, **LOCAL).fit_teacher(teacher)
        assert torch.equal(clustering.labels, alone.labels)
        assert torch.allclose(clustering.centroids, alone.centroids, atol=1e-6)
        assert_same_on_every_rank(clustering.centroids, clustering.labels)
        # Unequal shares of the episode, and the next episode's samples.
        episode = torch.arange(N)[(torch.arange(N) % 7 > 1)]
        own = episode.tensor_split([11, 12, 20][: world_size - 1])[rank]
        for index in (None, torch.arange(3, N, 3)):
            built = EpisodicClusterer(2).build(bank_of(own), {"t": clustering}, internal=False, index=index)
            one = EpisodicClusterer(2, **LOCAL).build(bank_of(episode), {"t": clustering}, internal=False, index=index)
            assert torch.equal(built.index, one.index)
            for key, term in one.terms.items():
                assert torch.allclose(built.terms[key].prototypes, term.prototypes, atol=1e-6)
                assert torch.equal(built.terms[key].labels, term.labels)
            assert built.report.unlabelled == one.report.unlabelled


@rank_case(world_sizes=(2,))
def clusterings_that_differ_by_rank_raise_on_all(rank, world_size, folder):
    """Such as the labels of K-means over ranks, which are of each rank's own rows."""
    labels = torch.zeros(N, dtype=torch.int64)
    labels[rank] = 1
    own = torch.arange(N)[own_rows(rank, [20, 30])]
    with pytest.raises(ValueError, match="ranks must agree on teachers"):
        EpisodicClusterer(2).build(bank_of(own), {"t": Clustering(torch.eye(2), labels)}, internal=False)
    same = Clustering(torch.eye(2), labels * 0)
    for _ in range(2):  # the second time by the checksum that was kept
        EpisodicClusterer(2).build(bank_of(own), {"t": same}, internal=False)
    assert same.labels is not None
    same.labels[rank] = 1
    with pytest.raises(ValueError, match="ranks must agree on teachers"):
        EpisodicClusterer(2).build(bank_of(own), {"t": same}, internal=False)
    same = Clustering(torch.eye(2), labels * 0)
    with pytest.raises(ValueError, match="ranks must agree on index"):
        EpisodicClusterer(2).build(bank_of(own), {"t": same}, internal=False, index=torch.tensor([rank]))
