"""The queue of recent features that online prototypes are computed from."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import RankRows


class FeatureQueue:
    """A ring buffer of the most recent samples: this rank's share of ``size`` samples of all ranks.

    Attributes:
        features: (capacity, D) float32 by name, on the device of the last batch; empty before the first.
        labels: (capacity,) int64 by teacher, each row's cluster when it was last assigned; -1 for none.
        sample_number: (capacity,) int64, the number of each row's sample in the run over all ranks; -1 where there is none.
        step_added: (capacity,) int64, the step in which the row was written; -1 where there is none.
        seen: samples pushed so far, over all ranks.
        cursor: the row that is written next.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.features: dict[str, Tensor] = {}
        self.labels: dict[str, Tensor] = {}
        self.sample_number, self.step_added = torch.empty((2, 0), dtype=torch.int64, device="cpu").unbind()
        self.seen = self.cursor = 0

    @property
    def widths(self) -> dict[str, int]:
        """Width of the features by name."""
        return {name: x.shape[1] for name, x in self.features.items()}

    def push(self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], ranks: RankRows, step: int) -> None:
        """Write a batch with its labels (B,) by teacher over the oldest rows."""
        capacity = -(-self.size // ranks.world_size)
        if self.features and len(self.sample_number) != capacity:
            self._resize(capacity)
        count = ranks.own.stop - ranks.own.start
        number = self.seen + torch.arange(ranks.own.start, ranks.own.stop, device="cpu")
        self.seen += ranks.total
        first, count = max(0, count - capacity), min(count, capacity)
        start = (self.cursor + first) % capacity
        self.cursor = (start + count) % capacity
        # At most two pieces of the ring: rows that follow each other need no index on the device.
        to_end = min(count, capacity - start)
        pieces = [(slice(start, start + to_end), slice(first, first + to_end))]
        pieces.append((slice(0, count - to_end), slice(first + to_end, first + count)))
        if not self.features:
            self.features = {k: x.new_zeros((capacity, x.shape[1]), dtype=torch.float32) for k, x in features.items()}
            self.sample_number, self.step_added = torch.full((2, capacity), -1, device="cpu").unbind()
        for name, x in features.items():
            self.features[name] = self.features[name].to(x.device)
        for rows, batch in pieces:
            for name, x in features.items():
                self.features[name][rows] = x[batch]
            self.sample_number[rows], self.step_added[rows] = number[batch], step
            self.set_labels(rows, {teacher: own[batch] for teacher, own in labels.items()})

    def set_labels(self, rows: Tensor | slice, labels: Mapping[str, Tensor]) -> None:
        """Remember the clusters (n,) by teacher of these rows, given by a slice or by their numbers (n,) on the CPU."""
        for teacher, own in labels.items():
            device = self.features[teacher].device
            known = self.labels.get(teacher, torch.full(self.sample_number.shape, -1, device=device)).to(device)
            known[rows if isinstance(rows, slice) else rows.to(device, non_blocking=True)] = own.to(device)
            self.labels[teacher] = known

    def rows(self, numbers: Tensor) -> dict[str, Tensor]:
        """The features of the rows with these numbers (n,), which are on the CPU."""
        on_device = {x.device: numbers.to(x.device, non_blocking=True) for x in self.features.values()}
        return {name: x[on_device[x.device]] for name, x in self.features.items()}

    def written(self) -> Tensor:
        """Numbers (n,) of the rows that hold a sample."""
        return (self.sample_number >= 0).nonzero()[:, 0]

    def due(self, step: int, every: int) -> Tensor:
        """Numbers (n,) of the earlier rows that are assigned in this step: each row once in ``every`` steps."""
        age = step - self.step_added
        return ((self.sample_number >= 0) & (age > 0) & (age % every == 0)).nonzero()[:, 0]

    def _resize(self, capacity: int) -> None:
        """Keep the most recent rows, oldest first: the state was saved on another number of processes."""
        kept = self.sample_number.argsort()[-capacity:]
        kept = kept[self.sample_number[kept] >= 0]

        def resized(x: Tensor, empty: int) -> Tensor:
            other = x.new_full((capacity, *x.shape[1:]), empty)
            other[: len(kept)] = x[kept.to(x.device)]
            return other

        self.features = {name: resized(x, 0) for name, x in self.features.items()}
        self.labels = {name: resized(x, -1) for name, x in self.labels.items()}
        self.sample_number, self.step_added = resized(self.sample_number, -1), resized(self.step_added, -1)
        self.cursor = len(kept) % capacity

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        names = ("sample_number", "step_added", "seen", "cursor")
        return {"queue": dict(self.features), "labels": dict(self.labels), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state_dict(cls, size: int, state: Mapping[str, Any]) -> "FeatureQueue":
        """The queue of a saved state of today or of 0.6; raises ValueError if its parts are not of equal length."""
        if "_queue" in state:
            names = {"queue": "_queue", "sample_number": "_number", "step_added": "_came", "cursor": "_cursor"}
            state = {**state, **{new: state[old] for new, old in names.items()}}
        self = cls(size)
        self.features = {name: x.clone() for name, x in state["queue"].items()}
        self.labels = {name: x.clone() for name, x in state.get("labels", {}).items()}  # 0.7.0 and earlier saved none
        self.sample_number, self.step_added = state["sample_number"].clone(), state["step_added"].clone()
        self.seen, self.cursor = state["seen"], state["cursor"]
        rows = {name: len(x) for name, x in {**self.features, "step_added": self.step_added}.items()}
        rows |= {f"labels of {name}": len(x) for name, x in self.labels.items()}
        for name, count in rows.items():
            if count != len(self.sample_number):
                raise ValueError(f"{name} in the state must have {len(self.sample_number)} rows as sample_number, got {count}")
        return self
