"""Episodic clustering: K-means of each teacher's features over one episode, then back translation into each student's space."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import plain_arithmetic
from ..clustering.kmeans import SETTINGS, KMeans, KMeansResult
from ..distributed import Group, RankRows, active_group, gather_sizes, gather_strings, validate_on_all_ranks, validate_rows
from ..episodes import FeatureBank
from .back_translation import back_translate_over_ranks
from .episode import Prototypes
from .report import EpisodeReport, agreements, centroid_drift, changed_share
from .source import Clustering, PrototypeTerm

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
        seed: of K-means.
        device: where K-means runs; None leaves it to the engine.
        warm_start: :meth:`build` starts K-means from the last centroids, so that prototypes keep their ids. The paper does not.
        max_dropped: the share of rows with NaN or Inf above which :meth:`fit` and :meth:`build` raise.
        process_group: None for the default group, ``False`` for this process alone, or a group.

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
        self.num_prototypes, self.niter, self.tol, self.nredo, self.backend = num_prototypes, niter, tol, nredo, backend
        self.spherical, self.seed, self.device, self.warm_start = spherical, seed, device, warm_start
        self.max_dropped, self.process_group = max_dropped, process_group
        self.previous: Prototypes | None = None
        self._kmeans()  # raises for a bad setting

    def _kmeans(self) -> KMeans:
        return _FeatureKMeans(self.num_prototypes, **{name: getattr(self, name) for name in SETTINGS})

    def __repr__(self) -> str:
        names = (*SETTINGS, "warm_start")
        return f"EpisodicClusterer({self.num_prototypes}, {', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def report(self) -> EpisodeReport | None:
        """The report of the last :meth:`build`. Deprecated: it is ``report`` of the prototypes that were built."""
        check.warn_renamed("EpisodicClusterer.report", "Prototypes.report")
        return None if self.previous is None else self.previous.report

    def fit(self, features: Tensor, *, init: Tensor | None = None, index: Tensor | None = None) -> KMeansResult:
        """Cluster this rank's rows (N, D) together with those of all ranks, with no prototypes: see :meth:`KMeans.fit`."""
        return self._kmeans().fit(features, init=init, index=index)

    @plain_arithmetic()
    def build(self, bank: FeatureBank, teachers: "Sequence[TeacherAdapter] | Mapping[str, TeacherAdapter]" = ()) -> Prototypes:
        """Cluster the bank's modalities and the external teachers' features of its samples; back-translate every pair.

        Each modality is a student of every other modality and of every external teacher. Labels of the whole episode are
        gathered onto every rank, so that any rank may train any sample. A sample that several ranks hold counts once. The
        result does not depend on which rank holds which sample: K-means orders them by their indices.

        Args:
            bank: this rank's rows of the episode, all written.
            teachers: external teachers, a mapping of names or a list (named ``teacher0``, ``teacher1``, ...).

        Returns:
            The prototypes, with an :class:`EpisodeReport` in ``report``.

        Raises:
            ValueError: bank rows never written, a teacher's name that is a modality, wrong numbers of rows, K > N.
            IndexError: a sample that a teacher does not have.
        """
        start = time.perf_counter()
        group = active_group(self.process_group)
        external = dict(teachers) if isinstance(teachers, Mapping) else {f"teacher{i}": t for i, t in enumerate(teachers)}
        features, ranks = _modalities(bank, group)
        sources = validate_on_all_ranks(
            lambda: _with_teachers(features, bank.index, external),
            group,
            signature=lambda: {
                "modalities": [(name, x.shape[1], x.dtype) for name, x in features.items()],
                "teachers": list(external),
                "warm_start": self.warm_start,
            },
        )
        index, owned = _first_occurrences(ranks.gather(bank.index), ranks)
        owned_ranks = RankRows(group, gather_sizes(int(owned.sum()), group))
        own_index = bank.index[owned]
        if not bool(owned.all()):
            sources = {name: x[owned] for name, x in sources.items()}
        order = owned_ranks.gather(own_index).argsort()
        seconds = {"collect": time.perf_counter() - start, "back_translate": 0.0}
        terms, reports = {}, {}
        for teacher, source in sources.items():
            result = self.fit(source, init=self._warm_centroids(teacher, source.shape[1]), index=own_index)
            reports[teacher] = result.report
            start = time.perf_counter()
            clustering = Clustering(result.centroids, owned_ranks.gather(result.labels)[order])
            for student in (name for name in features if name != teacher):
                means, counts = back_translate_over_ranks(result.labels, sources[student], self.num_prototypes, group)
                terms[student, teacher] = PrototypeTerm(means, (counts > 0) & (result.counts > 0), clustering)
            seconds["back_translate"] += time.perf_counter() - start
        prototypes = Prototypes(index, terms)
        start = time.perf_counter()
        drift, changed = ({}, {}) if self.previous is None else _compare(prototypes, self.previous)
        agreement = agreements(prototypes.labels_by_teacher)
        seconds["compare"] = time.perf_counter() - start
        prototypes.report = EpisodeReport(reports, agreement, drift, changed, seconds)
        self.previous = prototypes
        return prototypes

    def _warm_centroids(self, teacher: str, width: int) -> Tensor | None:
        """The last centroids, if a warm start is wanted and they fit."""
        last = self.previous.clusterings.get(teacher) if self.warm_start and self.previous is not None else None
        return last.centroids if last is not None and last.centroids.shape == (self.num_prototypes, width) else None

    def state_dict(self) -> dict[str, Any]:
        """The last prototypes: what the next episode is compared with, and with ``warm_start`` starts from."""
        return {"format": 1, "previous": None if self.previous is None else self.previous.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume after the episode that was saved."""
        check.state_format("EpisodicClusterer", state)
        check.state_has("EpisodicClusterer", state, ["previous"])
        self.previous = None if state["previous"] is None else Prototypes.from_state_dict(state["previous"])


class _FeatureKMeans(KMeans):
    _x_name, _k_name = "features", "num_prototypes"


def _modalities(bank: FeatureBank, group: Group | None) -> tuple[dict[str, Tensor], RankRows]:
    """The bank's features, and the rows of each rank; an empty bank that no batch reached has the others' features, no rows."""

    def complete() -> dict[str, Tensor]:
        if not isinstance(bank, FeatureBank):
            raise TypeError(f"bank must be a FeatureBank, got {type(bank).__name__}")
        if len(bank.index) or group is None:
            bank.require_complete()
        return bank.features

    features, ranks = validate_rows(complete, group, len(bank.index) if isinstance(bank, FeatureBank) else 0)
    kinds = json.dumps([(name, x.shape[1], str(x.dtype).removeprefix("torch.")) for name, x in features.items()])
    all_kinds = [kind for kind in map(json.loads, gather_strings(kinds, group)) if kind]
    if not all_kinds:
        raise ValueError("bank must hold a sample on some rank, got none on any")
    if not features:
        device = bank.index.device
        return {n: torch.empty((0, w), dtype=getattr(torch, d), device=device) for n, w, d in all_kinds[0]}, ranks
    return dict(features), ranks


def _with_teachers(features: Mapping[str, Tensor], index: Tensor, teachers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Everything that is clustered, by name: the bank's modalities and the teachers' features of its samples."""
    sources = dict(features)
    for name, teacher in teachers.items():
        if name in sources:
            raise ValueError(f"teachers must not be named like a modality of the bank, got {name!r}")
        rows = teacher[index]
        if rows.shape[0] != len(index):
            raise ValueError(f"teacher {name!r} must give {len(index)} rows for as many indices, got {rows.shape[0]}")
        sources[name] = rows.to(index.device)
    return sources


def _first_occurrences(gathered: Tensor, ranks: RankRows) -> tuple[Tensor, Tensor]:
    """The episode's samples (N,), sorted, and which of this rank's rows (n,) are the first to hold theirs."""
    index, inverse = torch.unique(gathered, return_inverse=True)
    position = torch.arange(len(gathered), device=gathered.device)
    first = torch.full_like(index, len(gathered)).scatter_reduce_(0, inverse, position, "amin")
    return index, (first[inverse] == position)[ranks.own]


def _compare(now: Prototypes, before: Prototypes) -> tuple[dict[str, float], dict[str, float]]:
    """Drift and share of changed labels of each clustering that both have; see :class:`EpisodeReport`."""
    drift: dict[str, float] = {}
    changed: dict[str, float] = {}
    common = torch.isin(now.index, before.index.to(now.index.device))
    position = before.positions(now.index[common].to(before.index.device), check_values=False)
    for teacher, clustering in now.clusterings.items():
        old = before.clusterings.get(teacher)
        if old is None or old.centroids.shape[1] != clustering.centroids.shape[1]:
            continue
        labels = now.labels_by_teacher[teacher]
        old_labels = before.labels_by_teacher[teacher].to(before.index.device)  # the loss may have moved them to its own
        drift[teacher], successors = centroid_drift(clustering.centroids, labels, old.centroids, old_labels)
        share = changed_share(successors, labels[common], old_labels[position].to(labels.device))
        if share is not None:
            changed[teacher] = share
    return drift, changed
