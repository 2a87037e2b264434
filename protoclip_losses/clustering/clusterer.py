"""Episodic clustering: K-means of each teacher's features over one episode, then back translation into each student's space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, active_group, agree, broadcast, gather_rows, rank, sum_over_ranks
from ..episodes import FeatureBank
from ..functional.back_translation import label_sums, means
from .assign import assign
from .faiss_engine import kmeans
from .prototypes import Prototypes, PrototypeTerm

if TYPE_CHECKING:
    from ..teachers import TeacherAdapter

BACKENDS = ("auto", "faiss")


@dataclass(frozen=True)
class Clusters:
    """A clustering of N rows.

    Attributes:
        centroids: (K, D) float32, the same on every rank; not normalised unless ``spherical``.
        labels: (N,) int64 of this rank's rows; -1 where the row was not finite.
        counts: (K,) int64, members of each cluster over all ranks; 0 where nobody is in it.
        objective: sum of squared distances to the assigned centroids, over all ranks.
        dropped: rows of all ranks that held NaN or Inf and were left out.
    """

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    objective: float
    dropped: int = 0


class EpisodicClusterer:
    r"""K-means over an episode.

    .. math::
        \min_{C, a} \sum_{i=1}^{N} \| x_i - C_{a_i} \|^2

    Args:
        num_prototypes: number K of clusters; the paper has about 10 points per prototype.
        niter: K-means iterations.
        nredo: K-means runs, the best one being kept.
        backend: ``"faiss"``, or ``"auto"`` which is the same here: on CPU, or on the GPU that ``device`` names.
        spherical: normalise centroids in each iteration. The paper does not.
        seed: of K-means; the same rows and the same seed give the same centroids.
        device: where K-means runs; None is CPU.
        max_dropped: the share of rows with NaN or Inf above which :meth:`fit` raises; below it they are left out and counted.
        process_group: None for the default group, ``False`` for this process alone, or a group.

    Under torch.distributed each rank passes its own rows, and all get the same centroids.

    Example:
        >>> import torch
        >>> clusterer = EpisodicClusterer(num_prototypes=2)
        >>> clusters = clusterer.fit(torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]]))
        >>> clusters.counts, clusters.objective
        (tensor([2, 2]), 1.0)

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996; faiss, https://faiss.ai.
    """

    def __init__(
        self,
        num_prototypes: int,
        *,
        niter: int = 20,
        nredo: int = 1,
        backend: str = "auto",
        spherical: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        max_dropped: float = 0.01,
        process_group: Group | bool | None = None,
    ) -> None:
        self.num_prototypes = check.positive_int("num_prototypes", num_prototypes)
        self.niter, self.nredo = check.positive_int("niter", niter), check.positive_int("nredo", nredo)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped must be a share in [0, 1], got {max_dropped}")
        self.backend, self.spherical, self.seed = backend, spherical, seed
        self.device = torch.device("cpu" if device is None else device)
        self.max_dropped, self.process_group = max_dropped, process_group

    def fit(self, features: Tensor) -> Clusters:
        """Cluster this rank's rows (N, D) together with those of all ranks.

        Raises:
            TypeError: features that are not floating point.
            ValueError: fewer finite rows than prototypes, more NaN or Inf than ``max_dropped`` allows.
            RuntimeError: a GPU is asked for and the installed faiss has none.
        """
        return self._fit(features, None)

    def _fit(self, features: Tensor, index: Tensor | None) -> Clusters:
        """:meth:`fit`; rows with a sample index are taken in its order, whichever rank holds them."""
        group = active_group(self.process_group)
        _, sizes = agree(
            lambda: check.matrix("features", features),
            group,
            len(features) if isinstance(features, Tensor) and features.dim() else 0,
            same=lambda: (features.shape[1], features.dtype, self.num_prototypes),
        )
        finite = torch.isfinite(features).all(1)
        points = features.detach()[finite]
        _, kept_sizes = agree(lambda: None, group, len(points))
        total, kept = sum(sizes), sum(kept_sizes)
        if total - kept > self.max_dropped * total:
            raise ValueError(
                f"features hold NaN or Inf in {total - kept} of {total} rows, more than max_dropped={self.max_dropped} allows"
            )
        if kept < self.num_prototypes:
            raise ValueError(
                f"features must have at least as many finite rows as num_prototypes={self.num_prototypes}, got {kept}; "
                "about 10 rows per prototype is usual"
            )
        points_of_all = gather_rows(points, kept_sizes, group)
        if index is not None:
            points_of_all = points_of_all[gather_rows(index[finite], kept_sizes, group).argsort()]
        centroids = self._centroids(points_of_all, group).to(features.device)
        labels = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        labels[finite], distances = assign(points, centroids)
        counts = sum_over_ranks(torch.bincount(labels[finite], minlength=self.num_prototypes), group)
        objective = float(sum_over_ranks(distances.double().sum(), group))
        return Clusters(centroids, labels, counts, objective, total - kept)

    def _centroids(self, points: Tensor, group: Group | None) -> Tensor:
        """K-means on the group's first rank; the others wait for its centroids, or for its error."""
        centroids = torch.zeros((self.num_prototypes, points.shape[1]))

        def run() -> Tensor:
            if rank(group) > 0:
                return centroids
            return kmeans(
                points,
                self.num_prototypes,
                niter=self.niter,
                nredo=self.nredo,
                spherical=self.spherical,
                seed=self.seed,
                device=self.device,
            )

        return broadcast(agree(run, group)[0], group)

    def build(self, bank: FeatureBank, teachers: "Sequence[TeacherAdapter] | Mapping[str, TeacherAdapter]" = ()) -> Prototypes:
        """Cluster the bank's modalities and the external teachers' features of its samples; back-translate every pair.

        Each modality is a student of every other modality and of every external teacher. Labels of the whole episode are
        gathered onto every rank, so that any rank may train any sample. A sample that several ranks hold counts once. The
        result does not depend on which rank holds which sample: K-means sees them in the order of their indices.

        Args:
            bank: this rank's rows of the episode, all written.
            teachers: external teachers, a mapping of names or a list (named ``teacher0``, ``teacher1``, ...).

        Raises:
            ValueError: bank rows never written, a teacher's name that is a modality, wrong numbers of rows, K > N.
            IndexError: a sample that a teacher does not have.
        """
        group = active_group(self.process_group)
        external = dict(teachers) if isinstance(teachers, Mapping) else {f"teacher{i}": t for i, t in enumerate(teachers)}
        sources, sizes = agree(
            lambda: self._sources(bank, external),
            group,
            len(bank.index) if isinstance(bank, FeatureBank) else 0,
            same=lambda: ([(name, x.shape[1], x.dtype) for name, x in bank.features.items()], list(external)),
        )
        everything = gather_rows(bank.index, sizes, group)
        index, owned = _first_occurrences(everything, sizes, rank(group))
        owned_sizes = agree(lambda: None, group, int(owned.sum()))[1]
        owners = gather_rows(bank.index[owned], owned_sizes, group)
        order = owners.argsort()
        students = {name: sources[name][owned] for name in bank.modalities}
        terms = {}
        for teacher, features in sources.items():
            clusters = self._fit(features[owned], bank.index[owned])
            labels = gather_rows(clusters.labels, owned_sizes, group)[order]
            for student in students:
                if student != teacher:
                    terms[student, teacher] = self._term(students[student], clusters, labels, group)
        return Prototypes(index, terms)

    def _sources(self, bank: FeatureBank, external: Mapping[str, Any]) -> dict[str, Tensor]:
        """Everything that is clustered, by name: the bank's modalities and the teachers' features of its samples."""
        if not isinstance(bank, FeatureBank):
            raise TypeError(f"bank must be a FeatureBank, got {type(bank).__name__}")
        bank.require_complete()
        sources = dict(bank.features)
        for name, teacher in external.items():
            if name in sources:
                raise ValueError(f"teachers must not be named like a modality of the bank, got {name!r}")
            rows = teacher[bank.index]
            if rows.shape[0] != len(bank.index):
                raise ValueError(f"teacher {name!r} must give {len(bank.index)} rows for as many indices, got {rows.shape[0]}")
            sources[name] = rows.to(bank.index.device)
        return sources

    def _term(self, student: Tensor, clusters: Clusters, labels: Tensor, group: Group | None) -> PrototypeTerm:
        own = clusters.labels.where(torch.isfinite(student).all(1), -1)
        sums, counts = label_sums(own, student, self.num_prototypes)
        counts = sum_over_ranks(counts, group)
        prototypes = means(sum_over_ranks(sums, group), counts)
        return PrototypeTerm(prototypes, clusters.centroids, labels, (counts > 0) & (clusters.counts > 0))


def _first_occurrences(everything: Tensor, sizes: list[int], own_rank: int) -> tuple[Tensor, Tensor]:
    """The episode's samples, sorted, and which of this rank's rows are the first to hold theirs."""
    index, inverse = torch.unique(everything, return_inverse=True)
    place = torch.arange(len(everything), device=everything.device)
    first = torch.full_like(index, len(everything)).scatter_reduce_(0, inverse, place, "amin")
    is_first = first[inverse] == place
    start = sum(sizes[:own_rank])
    return index, is_first[start : start + sizes[own_rank]]
