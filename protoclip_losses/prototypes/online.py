"""Online mode: prototypes for hosts whose loss never sees a sample index, from features that training computes anyway."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import sum_dtype
from ..clustering.assign import assign
from ..clustering.kmeans import KMeans
from ..clustering.points import finite_rows, segment_means_and_counts, segment_sums_and_counts
from ..distributed import Group, RankRows, sum_over_ranks
from .queue import FeatureQueue
from .source import BatchFeatures, Clustering, Pair, PrototypeSource, PrototypeTerm


class OnlinePrototypes(PrototypeSource, kind="online"):
    r"""Prototypes from a queue of recent projected features, updated every few steps while training continues.

    **Use it when:** no sample index reaches the loss, or an extraction pass costs too much.
    **Not when:** samples have an index and an extra forward pass is affordable: an episode's prototypes follow the paper.
    **Related:** :class:`Prototypes`, :class:`EpisodicClusterer`.

    There is no extraction pass and no sample index: a sample's label is the centroid nearest to the teacher's own feature of it,
    in the batch where it is used. **This departs from the paper**, whose episodes cluster features of one fixed model: here
    features in the queue are up to ``queue_size / batch`` steps old. The first prototypes come from K-means over the queue after
    ``warmup`` steps. From then on one iteration of Lloyd's algorithm is spread over each ``every`` steps: a step assigns one
    share of the queue to the present centroids and adds it to the sums

    .. math::
        C_k = \frac{1}{n_k} \sum_{i : a_i = k} x_i, \qquad P_k = \frac{1}{n_k} \sum_{i : a_i = k} h_i

    (teacher's features x, student's h: K-means' update and back translation). After ``every`` steps the sums, reduced over
    ranks, give the next centroids and prototypes. A step costs, in addition to training, the product of ``queue_size / every``
    rows with K centroids for each teacher. A centroid without members stays where it was and is not valid until it has some.

    Pass it to :meth:`ProtoLoss.set_prototypes`; the loss does the rest, in each call with gradients enabled. It is then called
    without ``index``, and external teachers come as ``teacher_features``, a mapping of name to (B, D_E).

    Args:
        num_prototypes: number K of prototypes of each teacher.
        queue_size: samples kept, over all ranks together, each its own; on W ranks the prototypes are those of one process if
            all have equal numbers of rows that divide ``queue_size / W``.
        every: steps from one set of prototypes to the next.
        warmup: steps before the first; InfoNCE alone is trained meanwhile.
        calls_per_step: calls of the loss for the same samples (open_clip's ``--accum-freq``); the last of them is observed.
        niter: iterations of the K-means after warm-up.
        seed: of that K-means.

    Attributes:
        terms: the present :class:`PrototypeTerm` of each (student, teacher), without labels; empty during warm-up.
        step: steps seen.
        version: how many sets of prototypes there have been.

    Example:
        >>> import torch
        >>> from protoclip_losses import ProtoLoss
        >>> loss = ProtoLoss(target_temperature=0.1)
        >>> loss.set_prototypes(OnlinePrototypes(num_prototypes=2, queue_size=8, every=2, warmup=2))
        >>> h = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2).sin(), dim=1)
        >>> parts = [loss(h, h, 10.0, output_dict=True) for _ in range(3)]
        >>> [float(x["proto_loss"]) > 0 for x in parts]
        [False, False, True]
    """

    needs_episodes = False

    def __init__(
        self,
        num_prototypes: int,
        queue_size: int,
        every: int,
        warmup: int,
        *,
        calls_per_step: int = 1,
        niter: int = 20,
        seed: int = 0,
    ) -> None:
        self.num_prototypes = check.positive_int("num_prototypes", num_prototypes)
        self.queue_size = check.positive_int("queue_size", queue_size)
        self.every, self.warmup = check.positive_int("every", every), check.positive_int("warmup", warmup)
        self.calls_per_step = check.positive_int("calls_per_step", calls_per_step)
        if queue_size < num_prototypes:
            raise ValueError(f"queue_size must be at least num_prototypes={num_prototypes}, got {queue_size}")
        self.niter, self.seed = check.positive_int("niter", niter), check.seed("seed", seed)
        self.terms: dict[Pair, PrototypeTerm] = {}
        self.calls = self.step = self.version = 0
        self.queue = FeatureQueue(queue_size)
        self.sums: dict[Pair, Tensor] = {}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in self._SETTINGS)
        return f"OnlinePrototypes({settings}; step {self.step}, version {self.version})"

    def labels(self, features: BatchFeatures | str, index: Tensor | None = None, *, check_values: bool | None = None) -> Any:
        """Labels (B,) of each teacher: the centroid nearest to its own feature, -1 for rows that are not finite.

        Raises:
            ValueError: an index is given, or features have other names or widths than in the first step.
        """
        if isinstance(features, str):  # labels(teacher, features) of 0.6
            check.warn_renamed("OnlinePrototypes.labels(teacher, features)", "labels(BatchFeatures(...), None)")
            return _nearest(cast(Tensor, index), self._centroids()[features])
        if index is not None:
            raise ValueError("index must be None with OnlinePrototypes: labels come from the nearest centroid")
        rows = len(next(iter(features.students.values())))
        for name, x in features.teachers.items():
            check.matrix(f"teacher_features[{name!r}]", x, rows=rows, of=" as image_features")
        by_name = features.by_name
        self._check_widths(by_name)
        return {teacher: _nearest(by_name[teacher], centroids) for teacher, centroids in self._centroids().items()}

    @torch.no_grad()
    def observe(self, features: BatchFeatures, labels: Mapping[str, Tensor], ranks: RankRows) -> None:
        """Take in a batch. Labels that are not given are those of :meth:`labels`.

        Raises:
            ValueError: other names or widths than before, or too few samples in the queue after ``warmup`` steps.
        """
        self.calls += 1
        if self.calls % self.calls_per_step:
            return
        by_name = features.by_name
        self._check_widths(by_name)
        self.step += 1
        self.queue.push(by_name, ranks, self.step)
        if not self.terms:
            if self.step >= self.warmup:
                self._start(list(features.students), ranks.group)
            return
        centroids = self._centroids()
        found = {name: labels[name] if name in labels else _nearest(by_name[name], c) for name, c in centroids.items()}
        self._accumulate(by_name, found, features.students)
        earlier = self.queue.rows(self.queue.due(self.step, self.every))
        self._accumulate(earlier, {name: _nearest(earlier[name], c) for name, c in centroids.items()}, features.students)
        if (self.step - self.warmup) % self.every == 0:
            self._renew(centroids, ranks.group)

    def update(
        self,
        students: Mapping[str, Tensor],
        teachers: Mapping[str, Tensor],
        group: Group | None = None,
        sizes: Sequence[int] = (),
        labels: Mapping[str, Tensor] = {},
    ) -> None:
        """:meth:`observe` as 0.6 called it."""
        check.warn_renamed("OnlinePrototypes.update", "OnlinePrototypes.observe")
        rows = len(next(iter(students.values())))
        self.observe(BatchFeatures(students, teachers), labels, RankRows(group, list(sizes) or [rows]))

    def check(self, features: Mapping[str, Tensor]) -> None:
        """Deprecated: :meth:`labels` checks names and widths."""
        check.warn_renamed("OnlinePrototypes.check", "OnlinePrototypes.labels")
        self._check_widths(features)

    def signature(self) -> dict[str, object]:
        """Settings and the step: all ranks must renew their prototypes together."""
        return {**super().signature(), **{name: getattr(self, name) for name in (*self._SETTINGS, "calls", "step")}}

    def _check_widths(self, features: Mapping[str, Tensor]) -> None:
        widths = {name: x.shape[1] for name, x in features.items()}
        known = self.queue.widths or widths
        if widths != known:
            raise ValueError(f"features must have the names and widths of the first step, {known}, got {widths}")

    def _start(self, students: Sequence[str], group: Group | None) -> None:
        """K-means over the queue, and the first prototypes."""
        written = self.queue.written()
        count = int(sum_over_ranks(written.sum(), group))
        if count < self.num_prototypes:
            raise ValueError(
                f"warmup={self.warmup} steps must leave at least num_prototypes={self.num_prototypes} samples in the queue, "
                f"got {count}"
            )
        number, features = self.queue.sample_number[written], self.queue.rows(written)
        kmeans = KMeans(self.num_prototypes, niter=self.niter, tol=0, seed=self.seed, max_dropped=1, process_group=group or False)
        centroids = {name: kmeans.fit(x, index=number.to(x.device)).centroids for name, x in features.items()}
        self._accumulate(features, {name: _nearest(x, centroids[name]) for name, x in features.items()}, students)
        self._renew(centroids, group)

    def _accumulate(self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], students: Iterable[str]) -> None:
        """Add these samples to the sums of the next prototypes."""
        for teacher, own in labels.items():
            for name in (teacher, *(s for s in students if s != teacher)):
                h = features[name]
                self._add((name, teacher), own.where(finite_rows(h), -1), h)

    def _add(self, key: Pair, labels: Tensor, x: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = x.new_zeros((self.num_prototypes, x.shape[1] + 1), dtype=sum_dtype(x.device))
        self.sums[key] = self.sums[key].to(x.device)  # a loaded state may be on another device
        present, inverse = torch.unique(labels[labels >= 0], return_inverse=True)
        self.sums[key][present] += segment_sums_and_counts(inverse, x[labels >= 0], len(present))  # only clusters that occur

    def _renew(self, centroids: Mapping[str, Tensor], group: Group | None) -> None:
        """Centroids and prototypes from the sums of all ranks; a centroid without members stays where it was."""
        means = {key: segment_means_and_counts(sum_over_ranks(x, group)) for key, x in self.sums.items()}
        for teacher, old in centroids.items():
            own, counts = means[teacher, teacher]
            clustering = Clustering(own.float().where(counts[:, None] > 0, old))
            for (student, of), (mean, found) in means.items():
                if of == teacher != student:
                    self.terms[student, teacher] = PrototypeTerm(mean.float(), (counts > 0) & (found > 0), clustering)
        self.sums = {}
        self.version += 1

    def _centroids(self) -> dict[str, Tensor]:
        return {teacher: x.centroids.to(self.queue.features[teacher].device) for teacher, x in self.clusterings.items()}

    _SETTINGS = ("num_prototypes", "queue_size", "every", "warmup", "calls_per_step", "niter", "seed")
    _COUNTERS = ("calls", "step", "version")

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume bit for bit. Under torch.distributed the queue is this rank's: save it on each."""
        numbers = {name: getattr(self, name) for name in (*self._SETTINGS, *self._COUNTERS)}
        parts = ("prototypes", "teacher_centroids", "valid")
        terms = {key: {part: getattr(term, part) for part in parts} for key, term in self.terms.items()}
        state = {"format": 1, "kind": self.kind, **numbers, **self.queue.state_dict()}
        return {**state, "sums": dict(self.sums), "terms": terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state; raises ValueError, and changes nothing, if it was made with other settings."""
        sums = state["_sums"] if check.state_format("OnlinePrototypes", state) == 0 else state["sums"]
        check.state_matches("OnlinePrototypes", state, {name: getattr(self, name) for name in self._SETTINGS})
        queue = FeatureQueue.from_state_dict(self.queue_size, state)
        clusterings = {teacher: Clustering(term["teacher_centroids"]) for (_, teacher), term in state["terms"].items()}
        terms = {
            (student, teacher): PrototypeTerm(term["prototypes"], term["valid"], clusterings[teacher])
            for (student, teacher), term in state["terms"].items()
        }
        self.calls, self.step, self.version = (state[name] for name in self._COUNTERS)
        self.queue, self.terms, self.sums = queue, terms, {key: x.clone() for key, x in sums.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "OnlinePrototypes":
        """Those of a saved state, for a process that has none yet."""
        self = cls(**{name: state[name] for name in cls._SETTINGS})
        self.load_state_dict(state)
        return self


def _nearest(features: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row, -1 where the row is not finite."""
    finite = finite_rows(features)
    return assign(features.detach().where(finite[:, None], 0), centroids)[0].where(finite, -1)
