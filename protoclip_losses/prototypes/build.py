"""Episodic clustering: K-means of each teacher's features over one episode, then back translation into each student's space."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import plain_arithmetic
from ..clustering.files import checksum
from ..clustering.kmeans import SETTINGS, KMeans, KMeansResult
from ..distributed import Group, RankRows, active_group, gather_sizes, rank, validate_on_all_ranks, world_size
from ..episodes import FeatureBank
from .back_translation import back_translate_over_ranks
from .clustering import Clustering
from .episode import Prototypes
from .episode_changes import report_of
from .episode_kmeans import FeatureKMeans, fit_known
from .episode_rows import clustering_of, first_occurrences, labels_of, modalities, with_teachers
from .report import EpisodeReport
from .source import PrototypeTerm

if TYPE_CHECKING:
    from ..teachers import TeacherAdapter


class EpisodicClusterer:
    r"""Builds the :class:`Prototypes` of an episode: K-means of each teacher's features, back translation for each student.

    .. math::
        \min_{C, a} \sum_{i=1}^{N} \| x_i - C_{a_i} \|^2, \qquad P_k = \frac{1}{n_k} \sum_{i : a_i = k} h_i

    (teacher's features x, student's h). Under torch.distributed each rank passes its own rows, and all get the same prototypes.

    **Use it when:** training is in episodes and samples have an index: extract features to a bank, build, train, repeat.
    **Not when:** the host's loss never sees a sample index (:class:`OnlinePrototypes`), or you only want labels of rows.
    **Related:** :class:`KMeans` does the clustering; :class:`FeatureBank`, :class:`TeacherAdapter`, :class:`ProtoLoss`.

    Args:
        num_prototypes: number K of clusters; the paper has about 10 samples for each.
        niter: K-means iterations, at most.
        tol: K-means stops at the iteration that lowers the objective by no more than this share; 0: when no label changes.
        nredo: K-means runs, of which the best is kept.
        backend: the engine, ``"auto"``, ``"torch"`` or ``"faiss"``; :class:`KMeans` says which is for what.
        spherical: normalise the centroids in each iteration. The paper does not.
        labels_per_sample: the L nearest centroids that a sample belongs to, as a mixture with equal weights.
        seed: of K-means.
        device: where K-means runs; None leaves it to the engine.
        warm_start: :meth:`build` starts K-means from the last centroids, so that prototypes keep their ids. The paper does not.
        max_dropped: the share of rows with NaN or Inf above which :meth:`fit` and :meth:`build` raise.
        max_cluster_size: no cluster has more samples, as :class:`KMeans` does it; None: no bound.
        process_group: None for the default group, ``False`` for this process alone, or a group.
        progress: show each K-means' iterations, objective and the time that is left, as :class:`KMeans` does.

    Attributes:
        previous: the last :class:`Prototypes`, which the next are compared with; saved by :meth:`state_dict`.

    Example:
        >>> import torch
        >>> bank = FeatureBank(torch.arange(4), dim=2)
        >>> images = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> bank.update(torch.arange(4), images, -images)
        >>> prototypes = EpisodicClusterer(num_prototypes=2).build(bank)
        >>> prototypes.terms["text", "image"].prototypes.sort(dim=0).values
        tensor([[-9.0000, -0.5000],
                [ 0.0000, -0.5000]])

    Source:
        ProtoCLIP sections III-C and III-D, https://arxiv.org/abs/2206.10996.
    """

    def __init__(
        self,
        num_prototypes: int,
        *,
        labels_per_sample: int = 1,
        niter: int = 20,
        tol: float = 1e-3,
        nredo: int = 1,
        backend: str = "auto",
        spherical: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        warm_start: bool = False,
        max_dropped: float = 0.01,
        max_cluster_size: int | None = None,
        process_group: Group | bool | None = None,
        progress: bool = False,
    ) -> None:
        self.num_prototypes, self.niter, self.tol, self.nredo, self.backend = num_prototypes, niter, tol, nredo, backend
        self.spherical, self.seed, self.device, self.warm_start = spherical, seed, device, warm_start
        self.max_dropped, self.max_cluster_size = max_dropped, max_cluster_size
        self.process_group, self.progress = process_group, progress
        self.previous: Prototypes | None = None
        self._kmeans()  # raises for a bad setting
        self.labels_per_sample = check.positive_int("labels_per_sample", labels_per_sample)
        limit = f"1 with max_cluster_size={max_cluster_size}" if max_cluster_size else f"num_prototypes={num_prototypes}"
        if labels_per_sample > (1 if max_cluster_size else num_prototypes):
            raise ValueError(f"labels_per_sample must be at most {limit}, got {labels_per_sample}")

    def _kmeans(self) -> KMeans:
        settings = {name: getattr(self, name) for name in (*SETTINGS, "progress")}
        return FeatureKMeans(self.num_prototypes, **settings)

    def __repr__(self) -> str:
        names = (*SETTINGS, "warm_start", *(["labels_per_sample"] if self.labels_per_sample > 1 else []))
        return f"EpisodicClusterer({self.num_prototypes}, {', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def report(self) -> EpisodeReport | None:
        """The report of the last :meth:`build`. Deprecated: it is ``report`` of the prototypes that were built."""
        check.warn_renamed("EpisodicClusterer.report", "Prototypes.report")
        return None if self.previous is None else self.previous.report

    def fit(
        self,
        features: Tensor | Iterable[Any],
        *,
        init: Tensor | None = None,
        index: Tensor | None = None,
        weights: Tensor | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> KMeansResult:
        """Cluster this rank's rows (N, D) together with those of all ranks, with no prototypes: see :meth:`KMeans.fit`."""
        return self._kmeans().fit(features, init=init, index=index, weights=weights, checkpoint=checkpoint)

    @plain_arithmetic()
    def fit_teacher(self, teacher: "TeacherAdapter") -> Clustering:
        """Cluster a teacher over all its samples, once: :meth:`build` takes the clustering in its place, and is spared K-means.

        Ranks share the work, and all get the labels of all samples; a row of zeros, which tells nothing, gets none.

        Returns:
            A :class:`Clustering`, labels by sample index: (N,), or (N, L) with ``labels_per_sample`` greater than 1.

        Raises:
            ValueError: fewer rows than clusters, or too many with NaN or Inf, as in :meth:`fit`.
        """
        group = active_group(self.process_group)
        share = torch.arange(len(teacher), device="cpu").tensor_split(world_size(group))[rank(group)]
        rows = validate_on_all_ranks(lambda: teacher[share], group, signature=lambda: {"samples of the teacher": len(teacher)})
        result, labels = fit_known(self._kmeans(), self.labels_per_sample, rows, share.to(rows.device))
        return Clustering(result.centroids, RankRows(group, gather_sizes(len(share), group)).gather(labels))

    @plain_arithmetic()
    def build(
        self,
        bank: FeatureBank,
        teachers: "Sequence[TeacherAdapter | Clustering | KMeansResult]\
            | Mapping[str, TeacherAdapter | Clustering | KMeansResult]" = (),
        *,
        internal: bool = True,
        index: Tensor | None = None,
    ) -> Prototypes:
        """Cluster the bank's modalities and the external teachers' features of its samples; back-translate every pair.

        Each modality is a student of every other modality and of every external teacher. Labels of the whole episode are
        gathered onto every rank, so that any rank may train any sample. A sample that several ranks hold counts once. The
        result does not depend on which rank holds which sample: K-means orders them by their indices.

        Args:
            bank: this rank's rows of the episode, all written.
            teachers: external teachers, a mapping of names or a list (named ``teacher0``, ``teacher1``, ...). One that was
                clustered over the whole data set, by :meth:`fit_teacher` or :class:`KMeans`, is not clustered again: a
                :class:`Clustering` or a :class:`KMeansResult`, with labels by sample index.
            internal: whether to cluster the bank's modalities too; False leaves external teachers alone.
            index: (M,) int64, the samples that will be trained, if other than the bank's: features that training computed then
                serve the next episode. Every teacher must have been clustered before. The same on all ranks.

        Returns:
            The prototypes, with an :class:`EpisodeReport` in ``report``. A label that none of the bank's samples has becomes -1.

        Raises:
            ValueError: bank rows never written, a teacher's name that is a modality, wrong numbers of rows, K > N, nothing to
                build, an ``index`` with a teacher that has to be clustered.
            IndexError: a sample that a teacher does not have.
        """
        start = time.perf_counter()
        group = active_group(self.process_group)
        named = dict(teachers) if isinstance(teachers, Mapping) else {f"teacher{i}": t for i, t in enumerate(teachers)}
        external = {name: clustering_of(name, t) if isinstance(t, (Clustering, KMeansResult)) else t for name, t in named.items()}
        features, ranks = modalities(bank, group)
        wanted = [*(features if internal else ()), *external]
        sources = validate_on_all_ranks(
            lambda: with_teachers(features, bank.index, external, wanted, index),
            group,
            signature=lambda: {
                "modalities": [(name, x.shape[1], x.dtype) for name, x in features.items()],
                "teachers": [(name, t.checksum() if isinstance(t, Clustering) else "features") for name, t in external.items()],
                "warm_start, internal and labels_per_sample": (self.warm_start, internal, self.labels_per_sample),
                "index": None if index is None else checksum(index),
            },
        )
        held, owned = first_occurrences(ranks.gather(bank.index), ranks)
        owned_ranks = RankRows(group, gather_sizes(int(owned.sum()), group))
        own_index = bank.index[owned]
        if not bool(owned.all()):
            sources = {name: x[owned] for name, x in sources.items()}
        order = owned_ranks.gather(own_index).argsort()
        trained = held if index is None else index.to(held.device)
        seconds = {"collect": time.perf_counter() - start, "back_translate": 0.0}
        terms, reports = {}, {}
        for name in wanted:
            teacher = external.get(name)
            if isinstance(teacher, Clustering):
                centroids, own_labels, labels = (
                    teacher.centroids.to(held.device),
                    sources[name],
                    labels_of(name, teacher, trained),
                )
            else:
                source = sources[name]
                init = self._warm_centroids(name, source.shape[1])
                result, own_labels = fit_known(
                    self._kmeans(), self.labels_per_sample, source, own_index, init, zeros_are_rows=teacher is None
                )
                centroids, labels, reports[name] = result.centroids, owned_ranks.gather(own_labels)[order], result.report
            start = time.perf_counter()
            students = [student for student in features if student != name]
            found = {s: back_translate_over_ranks(own_labels, sources[s], len(centroids), group) for s in students}
            in_use = torch.stack([counts > 0 for _, counts in found.values()])
            clustering = Clustering(centroids, labels.where(in_use.any(0)[labels.clamp(min=0)], -1))
            for (student, (means, _)), valid in zip(found.items(), in_use, strict=True):
                terms[student, name] = PrototypeTerm(means, valid, clustering)
            seconds["back_translate"] += time.perf_counter() - start
        prototypes = Prototypes(trained, terms)
        prototypes.report = report_of(prototypes, self.previous, reports, seconds)
        self.previous = prototypes
        return prototypes

    def _warm_centroids(self, teacher: str, width: int) -> Tensor | None:
        """The last centroids, if a warm start is wanted and they fit."""
        last = self.previous.clusterings.get(teacher) if self.warm_start and self.previous is not None else None
        return last.centroids if last is not None and last.centroids.shape == (self.num_prototypes, width) else None

    def state_dict(self) -> dict[str, Any]:
        """The last prototypes: what the next episode is compared with, and with ``warm_start`` starts from; and the history."""
        history = [] if self.previous is None else [dict(values) for values in self.previous.report.history]
        return {"format": 1, "previous": None if self.previous is None else self.previous.state_dict(), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume after the episode that was saved."""
        check.state_format("EpisodicClusterer", state)
        check.state_has("EpisodicClusterer", state, ["previous"])
        self.previous = None if state["previous"] is None else Prototypes.from_state_dict(state["previous"])
        if self.previous is not None:
            self.previous.report = EpisodeReport({}, {}, history=tuple(state.get("history", ())))  # 0.7.5 and earlier had none
