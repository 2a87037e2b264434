"""The features of an episode whose samples are only known as they come."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..teachers import TeacherAdapter
from .bank import FeatureBank


class FeatureCollector:
    """Collects what extraction yields from a stream, then makes the bank and the teachers that ``build`` takes.

    Args:
        dim: width D of image and text features.
        dtype: of storage; float16 halves the memory.
        device: of storage.

    Example:
        >>> collector = FeatureCollector(dim=2)
        >>> teacher = {"minilm": torch.rand(1, 5)}  # TeacherAdapter.encode(captions)
        >>> collector.update(torch.tensor([8]), torch.ones(1, 2), torch.ones(1, 2), teacher_features=teacher)
        >>> collector.update(torch.tensor([3]), torch.ones(1, 2), torch.ones(1, 2), teacher_features=teacher)
        >>> collector.bank().index, collector.teachers()["minilm"].dim
        (tensor([8, 3]), 5)
    """

    def __init__(self, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> None:
        self.dim, self.dtype, self.device = check.positive_int("dim", dim), dtype, device
        # Parts of rows, joined when they are asked for.
        self._index = [torch.zeros(0, dtype=torch.int64, device=device)]
        self._features: dict[str, list[Tensor]] = {}
        self._teachers: list[str] = []

    def update(
        self,
        index: Tensor,
        image_features: Tensor,
        text_features: Tensor,
        *,
        teacher_features: Mapping[str, Tensor] | None = None,
        **other_modalities: Tensor,
    ) -> None:
        """Add samples ``index`` (n,), each once: features (n, D), L2-normalised by the caller, and external teachers' by name.

        Raises:
            ValueError: wrong shapes, or other modalities or teachers than in the first update.
        """
        external = dict(teacher_features or {})
        if taken := external.keys() & {"image", "text", *other_modalities}:
            raise ValueError(f"teacher_features must not be named like a modality, got {sorted(taken)}")
        part = FeatureBank(index, self.dim, dtype=self.dtype, device=self.device)
        part.update(index, image_features, text_features, **other_modalities, **external)
        given = {name: x.shape[1] for name, x in part.features.items()}, sorted(external)
        before = {name: parts[0].shape[1] for name, parts in self._features.items()}, self._teachers
        if self._features and given != before:
            raise ValueError(
                f"update must be given the widths {before[0]} (teachers: {before[1]}) as before, got {given[0]} ({given[1]})"
            )
        self._index.append(part.index)
        for name, x in part.features.items():
            self._features.setdefault(name, []).append(x)
        self._teachers = given[1]

    def __len__(self) -> int:
        return sum(map(len, self._index))

    @property
    def index(self) -> Tensor:
        """(N,) int64, the samples so far."""
        return _joined(self._index)

    def bank(self) -> FeatureBank:
        """The bank of all samples so far."""
        bank = FeatureBank(self.index, self.dim, dtype=self.dtype, device=self.device)
        bank.features = {name: _joined(parts) for name, parts in self._features.items() if name not in self._teachers}
        bank.written.fill_(True)
        return bank

    def teachers(self) -> dict[str, TeacherAdapter]:
        """The external teachers by name, with features of the same samples."""
        return {name: TeacherAdapter.from_tensor(_joined(self._features[name]), index=self.index) for name in self._teachers}

    def state_dict(self) -> dict[str, Any]:
        """The samples so far, and which features are teachers'."""
        features = {name: _joined(parts) for name, parts in self._features.items()}
        return {"index": self.index, "features": features, "teachers": list(self._teachers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was collected; raises ValueError if it is of another width."""
        bank = FeatureBank(state["index"], self.dim, dtype=self.dtype, device=self.device)
        bank.load_state_dict({**state, "written": torch.ones(len(bank.index), dtype=torch.bool)})
        self._index, self._features = [bank.index], {name: [x] for name, x in bank.features.items()}
        self._teachers = list(state["teachers"])


def _joined(parts: list[Tensor]) -> Tensor:
    """All rows as one tensor, which takes the place of its parts."""
    if len(parts) > 1:
        parts[:] = [torch.cat(parts)]
    return parts[0]
