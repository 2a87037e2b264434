"""Episodic clustering: K-means of each teacher's features over one episode, then back translation into each student's space."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import sum_dtype
from ..clustering.assign import assign
from ..clustering.engines import BACKENDS, ENGINES, choose
from ..clustering.kmeans import Clusters, finite_points, places
from ..clustering.points import Rows, Settings
from ..clustering.report import ClusteringReport
from ..distributed import Group, RankRows, active_group, gather_sizes, sum_over_ranks, validate_on_all_ranks, validate_rows
from ..episodes import FeatureBank
from .episode import Prototypes
from .report import EpisodeReport, agreements, back_translated, compare, first_occurrences, modalities, with_teachers

if TYPE_CHECKING:
    from ..teachers import TeacherAdapter


class EpisodicClusterer:
    r"""K-means over an episode.

    .. math::
        \min_{C, a} \sum_{i=1}^{N} \| x_i - C_{a_i} \|^2

    Args:
        num_prototypes: number K of clusters; the paper has about 10 points per prototype.
        niter: K-means iterations, at most.
        tol: ``"torch"`` stops at the iteration that lowers the objective by no more than this share of it; 0: when labels settle.
        nredo: K-means runs, the best one being kept.
        backend: ``"torch"``, on the features' own device and over all ranks; ``"faiss"``, which gathers all rows on one rank;
            or ``"auto"``, which picks one and says in the report which and why.
        spherical: normalise centroids in each iteration. The paper does not.
        seed: of K-means; the same rows and the same seed give the same centroids.
        device: where K-means runs; None is the features' own device for ``"torch"`` and the CPU for ``"faiss"``.
        warm_start: :meth:`build` starts from the centroids of the build before, so that prototypes keep their numbers. The
            paper does not.
        max_dropped: the share of rows with NaN or Inf above which :meth:`fit` raises; below it they are left out and counted.
        process_group: None for the default group, ``False`` for this process alone, or a group.

    Under torch.distributed each rank passes its own rows, and all get the same centroids.

    Attributes:
        report: an :class:`EpisodeReport` of the last :meth:`build`, or None.
        previous: the :class:`Prototypes` that it returned, which the next one is compared with; saved by :meth:`state_dict`.

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
        tol: float = 1e-3,
        nredo: int = 1,
        backend: str = "auto",
        spherical: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        warm_start: bool = False,
        max_dropped: float = 0.01,
        process_group: Group | bool | None = None,
    ) -> None:
        self.num_prototypes = check.positive_int("num_prototypes", num_prototypes)
        self.niter, self.nredo = check.positive_int("niter", niter), check.positive_int("nredo", nredo)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if not 0 <= tol < 1:
            raise ValueError(f"tol must be a share in [0, 1), got {tol}")
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped must be a share in [0, 1], got {max_dropped}")
        self.backend, self.spherical, self.seed = backend, spherical, check.seed("seed", seed)
        self.device = None if device is None else torch.device(device)
        self.tol, self.warm_start, self.max_dropped, self.process_group = tol, warm_start, max_dropped, process_group
        self.report: EpisodeReport | None = None
        self.previous: Prototypes | None = None

    def fit(self, features: Tensor, *, init: Tensor | None = None, index: Tensor | None = None) -> Clusters:
        """Cluster this rank's rows (N, D) together with those of all ranks.

        Args:
            features: (N, D), this rank's rows.
            init: (K, D) centroids to start from, the same on every rank; None draws rows.
            index: (N,) int64, the number of each row: K-means takes rows in its order, so that which rank holds which does not
                matter. None is their own order, rank by rank.

        Raises:
            TypeError: features that are not floating point, an index that is not int64.
            ValueError: fewer finite rows than prototypes, more NaN or Inf than ``max_dropped`` allows, values that float32
                cannot square.
            RuntimeError: faiss is asked for a GPU and the installed one has none.
        """
        start = time.perf_counter()
        group = active_group(self.process_group)
        (finite, points), ranks = validate_rows(
            lambda: finite_points(features, index, init, self.num_prototypes),
            group,
            len(features) if isinstance(features, Tensor) and features.dim() else 0,
            signature=lambda: (features.shape[1], features.dtype, self.num_prototypes, init is None, index is None),
        )
        kept_ranks = RankRows(group, gather_sizes(len(points), group))
        total, kept = ranks.total, kept_ranks.total
        if total - kept > self.max_dropped * total:
            raise ValueError(
                f"features hold NaN or Inf in {total - kept} of {total} rows, more than max_dropped={self.max_dropped} allows"
            )
        if kept < self.num_prototypes:
            raise ValueError(
                f"features must have at least as many finite rows as num_prototypes={self.num_prototypes}, got {kept}; "
                "about 10 rows per prototype is usual"
            )
        backend, reason = choose(self.backend, self.device or features.device)
        device = self.device or (features.device if backend == "torch" else torch.device("cpu"))
        place = places(None if index is None else index[finite], points, kept_ranks)
        if backend == "torch":
            points, place = points.to(device), place.to(device)
        settings = Settings(self.niter, self.tol, self.nredo, self.spherical, self.seed, device, init)
        run = ENGINES[backend](Rows(points, place, kept_ranks), self.num_prototypes, settings)
        clustered = time.perf_counter()
        nearest, distances = assign(points, run.centroids, run.labels)
        counts = sum_over_ranks(torch.bincount(nearest, minlength=self.num_prototypes), group).to(features.device)
        objective = float(sum_over_ranks(distances.to(sum_dtype(distances.device)).sum(), group))
        labels = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        labels[finite] = nearest.to(features.device)
        report = ClusteringReport(
            backend=backend,
            reason=reason,
            objectives=run.objectives,
            objective=objective,
            imbalance=float((counts.float() / kept).square().sum() * self.num_prototypes),
            empty=int((counts == 0).sum()),
            reseeded=run.reseeded,
            dropped=total - kept,
            seconds={"kmeans": clustered - start, "assign": time.perf_counter() - clustered},
        )
        return Clusters(run.centroids.to(features.device), labels, counts, objective, total - kept, report)

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
        start = time.perf_counter()
        group = active_group(self.process_group)
        external = dict(teachers) if isinstance(teachers, Mapping) else {f"teacher{i}": t for i, t in enumerate(teachers)}
        features, ranks = modalities(bank, group)
        sources = validate_on_all_ranks(
            lambda: with_teachers(features, bank.index, external),
            group,
            signature=lambda: ([(name, x.shape[1], x.dtype) for name, x in features.items()], list(external)),
        )
        index, owned = first_occurrences(ranks.gather(bank.index), ranks)
        owned_ranks = RankRows(group, gather_sizes(int(owned.sum()), group))
        own_index = bank.index[owned]
        if not bool(owned.all()):
            sources = {name: x[owned] for name, x in sources.items()}
        order = owned_ranks.gather(own_index).argsort()
        seconds = {"collect": time.perf_counter() - start, "back_translate": 0.0}
        terms, reports = {}, {}
        for teacher, source in sources.items():
            clusters = self.fit(source, init=self._start(teacher, source.shape[1]), index=own_index)
            reports[teacher] = clusters.report
            start = time.perf_counter()
            labels = owned_ranks.gather(clusters.labels)[order]
            for student in (name for name in features if name != teacher):
                terms[student, teacher] = back_translated(
                    sources[student], clusters.labels, clusters.centroids, labels, clusters.counts > 0, group
                )
            seconds["back_translate"] += time.perf_counter() - start
        prototypes = Prototypes(index, terms)
        start = time.perf_counter()
        drift, changed = ({}, {}) if self.previous is None else compare(prototypes, self.previous)
        self.report = EpisodeReport(reports, agreements(prototypes), drift, changed, seconds)
        seconds["compare"] = time.perf_counter() - start
        self.previous = prototypes
        return prototypes

    def _start(self, teacher: str, width: int) -> Tensor | None:
        """The centroids of the build before, where it had such a clustering and a warm start is wanted."""
        term = self.previous.clusterings.get(teacher) if self.warm_start and self.previous is not None else None
        if term is None or term.centroids.shape != (self.num_prototypes, width):
            return None
        return term.centroids

    def state_dict(self) -> dict[str, Any]:
        """The last prototypes: what the next episode is compared with, and with ``warm_start`` begins from."""
        return {"previous": None if self.previous is None else self.previous.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the episode that was saved."""
        self.previous = None if state["previous"] is None else Prototypes.from_state_dict(state["previous"])
