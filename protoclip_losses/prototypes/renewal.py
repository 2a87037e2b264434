"""Online prototypes from the queue: the first by K-means, the next as means of clusters, and samples for lost centroids."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..clustering.draws import exponential_keys
from ..clustering.kmeans import KMeans
from ..clustering.points import ShardedPoints, finite_rows, positions
from ..distributed import Group, RankRows, sum_over_ranks, world_size
from ..kernels.sizes import rows_per_copy
from .cluster_sums import ClusterSums
from .clustering import Clustering
from .queue import FeatureQueue
from .source import Pair, PrototypeTerm


def first_clusterings(
    queue: FeatureQueue, num_prototypes: int, niter: int, seed: int, warmup: int, group: Group | None
) -> dict[str, Clustering]:
    """K-means of the queues of all ranks, for each teacher.

    Raises:
        ValueError: fewer samples than prototypes.
    """
    written = queue.written()
    count = int(sum_over_ranks(torch.tensor(len(written), device="cpu"), group))
    if count < num_prototypes:
        raise ValueError(
            f"warmup={warmup} steps must leave at least num_prototypes={num_prototypes} samples in the queue, got {count}"
        )
    number = queue.sample_number[written]
    kmeans = KMeans(num_prototypes, niter=niter, tol=0, seed=seed, max_dropped=1, process_group=group or False)
    features = queue.rows(written)
    return {name: Clustering(kmeans.fit(x, index=number.to(x.device)).centroids) for name, x in features.items()}


def renew(
    sums: ClusterSums, clusterings: Mapping[str, Clustering], queue: FeatureQueue, group: Group | None, seed: int, version: int
) -> tuple[dict[Pair, PrototypeTerm], dict[str, Tensor]]:
    """The next term of each (student, teacher), and of each teacher the share of clusters that had members; a collective.

    A centroid without members moves to a sample of the queue, as an empty cluster of K-means does. The sample is its only member
    until the next assignment: its student's features are the prototype. Without such a sample the centroid stays where it was,
    and is not valid.

    Args:
        sums: of this rank since the last prototypes.
        clusterings: of each teacher, by which the sums were made.
        queue: this rank's.
        group: None for one process.
        seed, version: of the draw of samples, the same on all ranks.
    """
    means, terms, in_use = sums.means(group), {}, {}
    for teacher, old in clusterings.items():
        own, counts = means[teacher, teacher]
        has_members = counts > 0
        in_use[teacher] = has_members.float().mean()
        centroids = own.float().where(has_members[:, None], old.centroids.to(own.device))
        lost = (~has_members).nonzero()[:, 0]  # the same on all ranks, as counts are those of all
        samples = draw_far_samples(queue, teacher, centroids, len(lost), group, seed, version) if len(lost) else {}
        if samples:
            lost = lost[: len(samples[teacher])]
            centroids[lost] = samples[teacher]
        clustering = Clustering(centroids)
        for (student, of), (mean, found) in means.items():
            if of != teacher or student == teacher:
                continue
            prototypes, valid = mean.float(), has_members & (found > 0)
            if samples:
                finite = finite_rows(samples[student])
                prototypes[lost], valid[lost] = samples[student].where(finite[:, None], 0), finite
            terms[student, teacher] = PrototypeTerm(prototypes, valid, clustering)
    return terms, in_use


def draw_far_samples(
    queue: FeatureQueue, teacher: str, centroids: Tensor, count: int, group: Group | None, seed: int, version: int
) -> dict[str, Tensor]:
    """Draw up to ``count`` different samples in proportion to their squared distance from their centroid, as k-means++ does.

    Args:
        queue: this rank's; samples of all ranks take part, those without a label of the teacher do not.
        teacher: in whose space distances are taken.
        centroids: (K, D).
        count: of samples; fewer are returned where all others equal their centroid.
        group: None for one process.
        seed, version: the draw depends on these and on the samples, not on which rank has which.

    Returns:
        Features (m, D) of the samples by name, the same on all ranks.
    """
    x, labels = queue.features[teacher], queue.labels[teacher]
    ranks = RankRows(group, [len(x)] * world_size(group))  # a row without a sample takes no part: no sizes to exchange
    weights = torch.zeros(len(x), device=x.device, dtype=torch.float32)
    for part in torch.split(torch.arange(len(x), device=x.device), rows_per_copy(x.shape[1], x.device)):
        block, own = x[part], labels[part]
        squares = (block - centroids[own.clamp(min=0)]).square().sum(1)
        is_distinct = squares > 1e-12 * block.square().sum(1)  # less is rounding of a sample that equals its centroid
        weights[part] = squares.where((own >= 0) & is_distinct, 0)
    position = positions(queue.sample_number.to(x.device), ranks)
    keys = exponential_keys(seed, version, 0, ranks.total).to(x.device)[position] / weights
    return {name: ShardedPoints(h, position, ranks).smallest(keys, count)[0] for name, h in queue.features.items()}
