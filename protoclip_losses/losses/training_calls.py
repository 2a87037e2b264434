"""Calls of a loss whose prototypes follow training: which of them are training steps, and which are run a second time.

Activation checkpointing runs a call again during backward. By then the prototypes may be the next ones, so that a loss with
other terms would be differentiated than the one that was returned, and the batch would be taken in twice.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import sum_dtype
from ..distributed import RankRows
from ..kernels.autograd import in_backward
from ..prototypes.batch_features import BatchFeatures
from ..prototypes.source import PrototypeSource
from .terms import WeightedTerms

MAX_AGE = 64  # calls for which one without gradients is remembered: the first run of a reentrant checkpoint
TOLERANCE = 1e-2  # of features that are computed again, whose sums may round differently


class TrainingCall:
    """A call of the loss: the terms and labels by which it was computed.

    Attributes:
        terms: of this call.
        labels: (B,) by teacher.
        is_observed: whether the prototypes have taken the batch in.
    """

    def __init__(self, terms: WeightedTerms, labels: Mapping[str, Tensor], batch: BatchFeatures) -> None:
        self.terms, self.labels, self.number = terms, labels, 0
        self.shapes, self.sums = _shapes(batch), _sums(batch)
        self.runs, self.is_observed = 1, False


class TrainingCalls:
    """The calls of a loss that may be run again. They are no part of its state, nor of a copy."""

    def __init__(self) -> None:
        self.count = 0
        self._with_graph: list[weakref.ref[TrainingCall]] = []
        self._without_graph: list[TrainingCall] = []

    def __reduce__(self) -> tuple[type["TrainingCalls"], tuple[()]]:
        return TrainingCalls, ()

    def first_run(self, batch: BatchFeatures) -> TrainingCall | None:
        """The call that is now run again, by its features; None if this is a call of its own."""
        if not in_backward():
            return None
        calls = [call for ref in self._with_graph if (call := ref()) is not None] + self._without_graph
        calls = [call for call in calls if call.shapes == _shapes(batch)]
        if not calls:
            return None
        sums = torch.stack([call.sums.to(batch.device) for call in calls])
        norms = torch.stack([torch.linalg.vector_norm(x.detach().float()) for x in batch.by_name.values()])
        differences = ((sums - _sums(batch)).abs() / norms.clamp(min=1e-30)).nan_to_num(0).amax(1).tolist()
        # Equal batches: the one run least often, and of these the latest, as backward goes from the last to the first.
        difference, call = min(zip(differences, calls, strict=True), key=lambda pair: (pair[0], pair[1].runs, -pair[1].number))
        if difference > TOLERANCE:
            return None
        call.runs += 1
        return call

    def remember(self, call: TrainingCall, values: Iterable[Tensor], is_training: bool) -> TrainingCall:
        """Remember a call for as long as the graph of what it returned can be run again; return it."""
        self.count += 1
        call.number = self.count
        self._with_graph = [ref for ref in self._with_graph if ref() is not None]
        self._without_graph = [call for call in self._without_graph if call.number > self.count - MAX_AGE]
        if torch.is_grad_enabled():
            self._with_graph.append(weakref.ref(call))
            for node in (value.grad_fn for value in values if value.grad_fn is not None):
                cast(Any, node).metadata["protoclip_losses"] = call
        elif is_training:
            self._without_graph.append(call)
        return call

    def observe(self, call: TrainingCall, source: PrototypeSource, batch: BatchFeatures, ranks: RankRows) -> None:
        """Let the source take the batch of a training step in, once."""
        if call.is_observed:
            return
        call.is_observed = True
        source.observe(batch, call.labels if call.terms.version == source.version else {}, ranks)
        if not any(h.requires_grad for h in batch.students.values()):
            check.warn_once(
                "features that need no gradient are taken in by the prototypes, as a training step: evaluate with loss.eval() or "
                "under torch.no_grad()"
            )


def _shapes(batch: BatchFeatures) -> list[tuple[str, torch.Size]]:
    return [(name, x.shape) for name, x in batch.by_name.items()]


def _sums(batch: BatchFeatures) -> Tensor:
    """The sum of each feature tensor: enough to tell batches apart, and never read outside of backward."""
    device = batch.device
    return torch.stack([x.detach().sum(dtype=sum_dtype(x.device)).to(device) for x in batch.by_name.values()])
