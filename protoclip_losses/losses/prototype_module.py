"""A loss in which prototypes are set: its settings, the prototypes as it uses them, and the state that is saved."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, RankRows, active_group, check_process_group
from ..kernels.autograd import constants
from ..prototypes.batch_features import BatchFeatures
from ..prototypes.extra_state import StateTensor, pack, unpack
from ..prototypes.source import PrototypeSource
from .module import LossModule
from .settings import OF_ONE_RANK, ObjectiveSettings
from .terms import WeightedTerms
from .training_calls import TrainingCall, TrainingCalls
from .warning_signs import PrototypeWatch, warn_of_clusters

SETTINGS = frozenset(f.name for f in fields(ObjectiveSettings))


class PrototypeModule(LossModule):
    """What :class:`~protoclip_losses.ProtoLoss` is apart from its forward."""

    def __init__(self, settings: ObjectiveSettings, process_group: Group | bool | None) -> None:
        super().__init__()
        self.settings = settings
        self.process_group = check_process_group(process_group)
        self.metrics: dict[str, Tensor] = {}
        self._is_set = False
        self._prototypes: PrototypeSource | None = None
        self._terms = WeightedTerms(None, settings)
        self._calls = TrainingCalls()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name) if name in SETTINGS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A changed setting is checked; temperatures and weights of prototype terms hold from the next :meth:`set_prototypes`."""
        if name in SETTINGS:
            self._compared = self._compared if name in OF_ONE_RANK else None
            name, value = "settings", replace(self.settings, **{name: value})
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{self.settings.as_arguments()}, prototypes={self._prototypes if self._is_set else 'not set'}"

    @property
    def prototypes(self) -> PrototypeSource | None:
        """The prototypes that are set."""
        return self._prototypes

    @property
    def needs_episodes(self) -> bool:
        """Whether the training loop has to set each episode's prototypes; False if those set keep themselves up to date."""
        return self._prototypes is None or self._prototypes.needs_episodes

    def set_prototypes(self, prototypes: PrototypeSource | None) -> None:
        """Use these from now on; None means the pair loss only, on purpose (warm-up, LiT). Each M is built once, here.

        Args:
            prototypes: :class:`Prototypes` of an episode, :class:`OnlinePrototypes`, or another :class:`PrototypeSource`.

        Raises:
            TypeError: no source of prototypes.
            ValueError: no weight for an external teacher, a weight for an unknown one, or without back translation a teacher of
                another width.
        """
        if prototypes is not None and not isinstance(prototypes, PrototypeSource):
            raise TypeError(f"prototypes must be Prototypes, OnlinePrototypes or None, got {type(prototypes).__name__}")
        self._terms.watch.tell()
        warn_of_clusters(prototypes, active_group(self.process_group))
        with constants():
            terms = WeightedTerms(prototypes, self.settings, PrototypeWatch(prototypes, self._terms.watch))
            terms.fill()
        self._prototypes, self._terms, self._is_set, self._compared = prototypes, terms, True, None

    def _begin(self, batch: BatchFeatures) -> tuple[WeightedTerms, TrainingCall | None]:
        """The terms of this call; and the call that it runs again, if it does."""
        first = None if self.needs_episodes else self._calls.first_run(batch)
        if first is not None:
            return first.terms, first
        if self._prototypes is not None and self._prototypes.version != self._terms.version:
            with constants():
                # Targets come as needed: no step waits for all.
                self._terms = WeightedTerms(self._prototypes, self.settings, self._terms.watch)
        return self._terms, None

    def _end(
        self,
        first: TrainingCall | None,
        batch: BatchFeatures,
        labels: Mapping[str, Tensor],
        ranks: RankRows,
        metrics: Mapping[str, Tensor],
        values: Iterable[Tensor],
    ) -> None:
        """Report the call's metrics, and let the prototypes take a batch of training in."""
        source, is_step = self._prototypes, self.training and torch.is_grad_enabled()
        if first is None:
            self.metrics = {**metrics} if source is None else {**metrics, **source.metrics}
        if source is None:
            return
        if source.needs_episodes:
            if is_step:
                source.observe(batch, labels, ranks)
            return
        call = first or self._calls.remember(TrainingCall(self._terms, labels, batch), values, self.training)
        if is_step:
            self._calls.observe(call, source, batch, ranks)

    def get_extra_state(self) -> StateTensor:
        """The prototypes as one tensor: what ``state_dict()`` saves. In online mode with the queue of this rank."""
        self._terms.watch.tell()
        source = self._prototypes
        # After the last step of an online cycle the terms here are still those of the prototypes before.
        is_current = source is not None and source.version == self._terms.version
        state = {
            "format": 1,
            "is_set": self._is_set,
            "prototypes": None if source is None else source.state_dict(),
            "targets": self._terms.state_dict() if is_current else [],
        }
        return pack(state)

    def set_extra_state(self, state: Any) -> None:
        """Set the prototypes that were saved."""
        state = unpack(state)
        saved = state.get("prototypes")
        if check.state_format("ProtoLoss", state) == 0:
            online = state.get("online")
            saved = {**online, "kind": "online"} if online is not None else saved and {**saved, "kind": "episode"}
        with constants():
            source = None if saved is None else PrototypeSource.of_state(saved)
            terms = WeightedTerms(source, self.settings)
            terms.load_state_dict(state.get("targets"))
        self._prototypes, self._terms, self._is_set, self._compared = source, terms, state["is_set"], None
