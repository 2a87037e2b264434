"""Online mode: prototypes for hosts whose loss never sees a sample index, from features that training computes anyway."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, RankRows
from ..kernels.autograd import constants
from .batch_features import BatchFeatures
from .cluster_sums import ClusterSums
from .clustering import Clustering
from .nearest import nearest_centroid, nearest_centroids, with_known_rows
from .queue import FeatureQueue
from .renewal import first_clusterings, renew
from .source import Pair, PrototypeSource, PrototypeTerm


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
    rows with K centroids for each teacher. A centroid without members moves to a sample of the queue, drawn in proportion to its
    squared distance from its own centroid, as in K-means; ``in_use`` says how many had members.

    Pass it to :meth:`ProtoLoss.set_prototypes`; the loss does the rest, in each call in training mode with gradients enabled. It
    is then called without ``index``, and external teachers come as ``teacher_features``, a mapping of name to (B, D_E).

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
        in_use: of each teacher, the share of prototypes that had members over the last ``every`` steps, a () tensor. It falls
            where features move faster than prototypes follow: lower ``every``. ``ProtoLoss.metrics`` reports it.

    Example:
        >>> import torch
        >>> from protoclip_losses import ProtoLoss
        >>> loss = ProtoLoss(target_temperature=0.1)
        >>> loss.set_prototypes(OnlinePrototypes(num_prototypes=2, queue_size=8, every=2, warmup=2))
        >>> h = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2).sin(), dim=1).requires_grad_()
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
        self.in_use: dict[str, Tensor] = {}
        self.calls = self.step = self.version = 0
        self.queue = FeatureQueue(queue_size)
        self.sums = ClusterSums(num_prototypes)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in self._SETTINGS)
        return f"OnlinePrototypes({settings}; step {self.step}, version {self.version})"

    @torch.no_grad()
    def labels(self, features: BatchFeatures | str, index: Tensor | None = None, *, check_values: bool | None = None) -> Any:
        """Labels (B,) of each teacher: the centroid nearest to its own feature, -1 for rows that are not finite.

        So for rows of zeros of an external teacher, which knows nothing of the sample.

        Raises:
            ValueError: an index is given, or features have other names or widths than in the first step.
        """
        if isinstance(features, str):  # labels(teacher, features) of 0.6
            check.warn_renamed("OnlinePrototypes.labels(teacher, features)", "labels(BatchFeatures(...), None)")
            return nearest_centroid(cast(Tensor, index), self.clusterings[features].centroids)
        if index is not None:
            raise ValueError("index must be None with OnlinePrototypes: labels come from the nearest centroid")
        image = next(iter(features.students.values()))
        for name, x in features.teachers.items():
            check.matrix(f"teacher_features[{name!r}]", x, rows=len(image), of=" as image_features")
            check.same_device(f"teacher_features[{name!r}]", x, "image_features", image)
        by_name = with_known_rows(features)
        self._check_widths(by_name)
        return nearest_centroids(by_name, self.clusterings)

    @constants()
    def observe(self, features: BatchFeatures, labels: Mapping[str, Tensor], ranks: RankRows) -> None:
        """Take in a batch. Labels that are not given are those of :meth:`labels`.

        Raises:
            ValueError: other names or widths than before, or too few samples in the queue after ``warmup`` steps.
        """
        self.calls += 1
        if self.calls % self.calls_per_step:
            return
        by_name, students, clusterings = with_known_rows(features), list(features.students), self.clusterings
        self._check_widths(by_name)
        self.step += 1
        found = nearest_centroids(by_name, clusterings, given=labels)
        self.queue.push(by_name, found, ranks, self.step)
        if self.terms:
            self._assign(self.queue.due(self.step, self.every), students, clusterings, by_name, found)
            if (self.step - self.warmup) % self.every == 0:
                self._renew(clusterings, ranks.group)
        elif self.step >= self.warmup:
            clusterings = first_clusterings(self.queue, self.num_prototypes, self.niter, self.seed, self.warmup, ranks.group)
            self._assign(self.queue.written(), students, clusterings)
            self._renew(clusterings, ranks.group)

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

    @property
    def metrics(self) -> dict[str, Tensor]:
        """``prototypes_in_use/TEACHER``: ``in_use`` of each teacher; empty during warm-up."""
        return {f"prototypes_in_use/{teacher}": share for teacher, share in self.in_use.items()}

    def signature(self) -> dict[str, object]:
        """Settings and the step: all ranks must renew their prototypes together."""
        return {**super().signature(), **{name: getattr(self, name) for name in (*self._SETTINGS, "calls", "step")}}

    def _check_widths(self, features: Mapping[str, Tensor]) -> None:
        widths = {name: x.shape[1] for name, x in features.items()}
        known = self.queue.widths or widths
        if widths != known:
            raise ValueError(f"features must have the names and widths of the first step, {known}, got {widths}")

    def _assign(
        self,
        rows: Tensor,
        students: Sequence[str],
        clusterings: Mapping[str, Clustering],
        batch: Mapping[str, Tensor] = {},
        found: Mapping[str, Tensor] = {},
    ) -> None:
        """Assign these rows (n,) of the queue, and add them, with a batch and its labels, to the sums of the next prototypes."""
        features = self.queue.rows(rows)
        labels = nearest_centroids(features, clusterings)
        self.queue.set_labels(rows, labels)
        if batch:
            features = {name: torch.cat([batch[name].detach(), x]) for name, x in features.items()}
            labels = {teacher: torch.cat([found[teacher], own]) for teacher, own in labels.items()}
        self.sums.add(features, labels, students)

    def _renew(self, clusterings: Mapping[str, Clustering], group: Group | None) -> None:
        """The next prototypes, by the sums since the last ones."""
        self.terms, self.in_use = renew(self.sums, clusterings, self.queue, group, self.seed, self.version + 1)
        self.sums = ClusterSums(self.num_prototypes)
        self.version += 1

    _SETTINGS = ("num_prototypes", "queue_size", "every", "warmup", "calls_per_step", "niter", "seed")
    _COUNTERS = ("calls", "step", "version")

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume bit for bit. Under torch.distributed the queue is this rank's: save it on each."""
        numbers = {name: getattr(self, name) for name in (*self._SETTINGS, *self._COUNTERS)}
        parts = ("prototypes", "teacher_centroids", "valid")
        terms = {key: {part: getattr(term, part) for part in parts} for key, term in self.terms.items()}
        state = {"format": 1, "kind": self.kind, **numbers, **self.queue.state_dict()}
        return {**state, "sums": self.sums.sums, "terms": terms, "in_use": dict(self.in_use)}

    @constants()
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
        self.queue, self.terms, self.sums = queue, terms, ClusterSums(self.num_prototypes, sums)
        self.in_use = {teacher: x.clone() for teacher, x in state.get("in_use", {}).items()}  # 0.7.0 and earlier saved none

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "OnlinePrototypes":
        """Those of a saved state, for a process that has none yet."""
        self = cls(**{name: state[name] for name in cls._SETTINGS})
        self.load_state_dict(state)
        return self
