"""Online mode: prototypes for hosts whose loss never sees a sample index, from features that training has computed anyway."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import sum_dtype
from ..clustering.assign import assign
from ..clustering.points import finite_rows, segment_means_and_counts, segment_sums_and_counts
from ..distributed import Group, rank, sum_over_ranks, world_size
from .build import EpisodicClusterer
from .episode import PrototypeTerm, Terms


class OnlinePrototypes(Terms):
    r"""Prototypes from a queue of the most recent projected features, made anew every few steps while training goes on.

    There is no extraction pass and no sample index: the label of a sample is the nearest centroid to the teacher's own feature
    of it, in the batch where it is used. **This departs from the paper**, whose episodes cluster features of one fixed model:
    here features of the queue are up to ``queue_size / batch`` steps old.

    The first prototypes come from K-means over the queue after ``warmup`` steps. From then on one iteration of Lloyd's
    algorithm is spread over each ``every`` steps: a step assigns the share of the queue whose turn it is to the present
    centroids and adds it to the sums

    .. math::
        C_k = \frac{1}{n_k} \sum_{i : a_i = k} x_i, \qquad P_k = \frac{1}{n_k} \sum_{i : a_i = k} h_i

    (teacher's features x, student's h: K-means' update and back translation). After ``every`` steps the sums, reduced over
    ranks, are the next centroids and prototypes. So no step stalls: what one costs beside its training is the product of
    ``queue_size / every`` rows with K centroids, for each teacher. A centroid without members stays where it was and is not
    valid until it has some.

    Pass it to :meth:`ProtoLoss.set_prototypes`; the loss does the rest, in each call with gradients enabled. The loss is then
    called without ``index``, and external teachers come as ``teacher_features``, a mapping of name to (B, D_E).

    Args:
        num_prototypes: K.
        queue_size: samples kept, over all ranks together. Each rank keeps its own; on W ranks the prototypes are those of one
            process where all give equal numbers of rows and these divide ``queue_size / W``.
        every: steps from one set of prototypes to the next.
        warmup: steps before the first; InfoNCE alone is trained meanwhile.
        calls_per_step: calls of the loss for the same samples (open_clip's ``--accum-freq``). The last of them takes the samples
            in, so that all have the same prototypes.
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
        self.terms = {}
        self.calls = self.step = self.version = self.seen = self._cursor = 0
        self._queue: dict[str, Tensor] = {}
        self._number = torch.empty(0, dtype=torch.int64)  # of each row of the queue: which sample of the run it is, by rank,
        self._came = torch.empty(0, dtype=torch.int64)  # and the step in which it came
        self._sums: dict[tuple[str, str], Tensor] = {}

    def labels(self, teacher: str, features: Tensor) -> Tensor:
        """The nearest of a teacher's centroids to its own features (B, D_E); -1 for rows that are not finite."""
        return _assigned(features, self._centroids()[teacher])

    @torch.no_grad()
    def update(
        self,
        students: Mapping[str, Tensor],
        teachers: Mapping[str, Tensor],
        group: Group | None = None,
        sizes: Sequence[int] = (),
        labels: Mapping[str, Tensor] = {},
    ) -> None:
        """Take in a batch: features of each modality and of each external teacher, one row a sample.

        Args:
            students: projected features (B, D) by modality; each modality is a teacher of the others.
            teachers: external teachers' features (B, D_E) by name.
            group: the ranks that train together, None on one process.
            sizes: rows that each of them gives in this step.
            labels: what :meth:`labels` says of this batch, by teacher, where the loss has asked already.

        Raises:
            ValueError: other names or widths than before, or too few samples in the queue after ``warmup`` steps.
        """
        self.calls += 1
        if self.calls % self.calls_per_step:
            return
        features = {**students, **teachers}
        self.check(features)
        self._push(features, group, sizes)
        self.step += 1
        if not self.terms:
            if self.step >= self.warmup:
                self._begin(list(students), group)
            return
        centroids = self._centroids()
        found = {name: labels[name] if name in labels else _assigned(features[name], at) for name, at in centroids.items()}
        self._accumulate(features, found, students)
        earlier = self._rows((self._came >= 0) & (self._came < self.step) & ((self.step - self._came) % self.every == 0))
        self._accumulate(earlier, {name: _assigned(earlier[name], at) for name, at in centroids.items()}, students)
        if (self.step - self.warmup) % self.every == 0:
            self._renew(centroids, group)

    def check(self, features: Mapping[str, Tensor]) -> None:
        """Raise ValueError if these are other modalities and teachers, or of other widths, than in the first step."""
        widths = {name: x.shape[1] for name, x in features.items()}
        known = {name: x.shape[1] for name, x in self._queue.items()} or widths
        if widths != known:
            raise ValueError(f"features must have the names and widths of the first step, {known}, got {widths}")

    def _push(self, features: Mapping[str, Tensor], group: Group | None, sizes: Sequence[int]) -> None:
        """Write a batch over the oldest rows of this rank's part of the queue."""
        capacity = -(-self.queue_size // world_size(group))
        rows = len(next(iter(features.values())))
        sizes = list(sizes) or [rows]
        number = self.seen + sum(sizes[: rank(group)]) + torch.arange(rows)
        self.seen += sum(sizes)
        place = (self._cursor + torch.arange(rows)) % capacity
        self._cursor = (self._cursor + rows) % capacity
        kept = slice(max(0, rows - capacity), rows)
        if not self._queue:
            self._queue = {k: x.new_zeros((capacity, x.shape[1]), dtype=torch.float32) for k, x in features.items()}
            self._number, self._came = torch.full((2, capacity), -1).unbind()
        for name, x in features.items():
            queue = self._queue[name] = self._queue[name].to(x.device)
            queue[place[kept].to(x.device)] = x[kept].float()
        self._number[place[kept]], self._came[place[kept]] = number[kept], self.step + 1

    def _rows(self, which: Tensor) -> dict[str, Tensor]:
        """These rows of the queue."""
        return {name: x[which.to(x.device)] for name, x in self._queue.items()}

    def _begin(self, students: Sequence[str], group: Group | None) -> None:
        """K-means over the queue, and the first prototypes."""
        held = int(sum_over_ranks((self._number >= 0).sum(), group))
        if held < self.num_prototypes:
            raise ValueError(
                f"warmup={self.warmup} steps must leave at least num_prototypes={self.num_prototypes} samples in the queue, "
                f"got {held}"
            )
        held_here = self._number >= 0
        number, queue = self._number[held_here], self._rows(held_here)
        clusterer = EpisodicClusterer(
            self.num_prototypes, niter=self.niter, tol=0, seed=self.seed, max_dropped=1, process_group=group or False
        )
        centroids = {name: clusterer.fit(x, index=number.to(x.device)).centroids for name, x in queue.items()}
        self._accumulate(queue, {name: _assigned(x, centroids[name]) for name, x in queue.items()}, students)
        self._renew(centroids, group)

    def _accumulate(self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], students: Iterable[str]) -> None:
        """Add these samples to the sums of the prototypes to come."""
        for teacher, own in labels.items():
            for name in (teacher, *(s for s in students if s != teacher)):
                h = features[name]
                self._add((name, teacher), own.where(finite_rows(h), -1), h)

    def _add(self, key: tuple[str, str], labels: Tensor, x: Tensor) -> None:
        if key not in self._sums:
            self._sums[key] = x.new_zeros((self.num_prototypes, x.shape[1] + 1), dtype=sum_dtype(x.device))
        self._sums[key] = self._sums[key].to(x.device)  # a state that was loaded may lie elsewhere
        met, place = torch.unique(labels[labels >= 0], return_inverse=True)
        self._sums[key][met] += segment_sums_and_counts(place, x[labels >= 0], len(met))  # of the clusters met alone

    def _renew(self, centroids: Mapping[str, Tensor], group: Group | None) -> None:
        """Centroids and prototypes from the sums of all ranks; a centroid that nothing is near stays where it was."""
        means = {key: segment_means_and_counts(sum_over_ranks(x, group)) for key, x in self._sums.items()}
        for teacher, old in centroids.items():
            own, counts = means[teacher, teacher]
            new = own.float().where(counts[:, None] > 0, old)
            for (student, of), (mean, found) in means.items():
                if of == teacher != student:
                    empty = torch.empty(0, dtype=torch.int64, device=mean.device)
                    self.terms[student, teacher] = PrototypeTerm(mean.float(), new, empty, (counts > 0) & (found > 0))
        self._sums = {}
        self.version += 1

    def _centroids(self) -> dict[str, Tensor]:
        return {teacher: term.teacher_centroids.to(self._queue[teacher].device) for teacher, term in self.clusterings.items()}

    _SETTINGS = ("num_prototypes", "queue_size", "every", "warmup", "calls_per_step", "niter", "seed")
    _COUNTERS = ("calls", "step", "version", "seen", "_cursor", "_queue", "_number", "_came", "_sums")

    def state_dict(self) -> dict[str, Any]:
        """Everything it takes to go on bit for bit. Under torch.distributed the queue is this rank's: save it on each."""
        state = {name: getattr(self, name) for name in (*self._SETTINGS, *self._COUNTERS)}
        return {**state, "terms": {key: dict(vars(term)) for key, term in self.terms.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was; raises ValueError if it was made with other settings."""
        for name in self._SETTINGS:
            if state[name] != getattr(self, name):
                raise ValueError(f"state_dict has {name}={state[name]} but these prototypes have {name}={getattr(self, name)}")
        for name in self._COUNTERS:
            value = state[name]
            if isinstance(value, Mapping):
                value = {key: x.clone() for key, x in value.items()}
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.terms = {key: PrototypeTerm(**term) for key, term in state["terms"].items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "OnlinePrototypes":
        """Those of a saved state, for a process that has none yet."""
        self = cls(**{name: state[name] for name in cls._SETTINGS})
        self.load_state_dict(state)
        return self


def _assigned(features: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each row, -1 where the row is not finite."""
    finite = finite_rows(features)
    return assign(features.detach().where(finite[:, None], 0), centroids)[0].where(finite, -1)
