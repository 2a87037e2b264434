"""The features of an episode whose samples are only known as they are read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..teachers import TeacherAdapter
from .bank import FeatureBank


class FeatureCollector:
    """Collects what extraction yields from a stream, then makes the bank and the teachers that ``build`` takes.

    ``len(collector)`` is the number of samples so far.

    **Use it when:** samples become known as they are read, as those of a :class:`StreamEpisode` do.
    **Not when:** the samples of the episode are known beforehand; use :class:`FeatureBank`.
    **Related:** :meth:`StreamEpisode.batches` yields what is collected; :class:`EpisodicClusterer` builds prototypes of it.

    Args:
        dim: width D of image and text features.
        dtype: of storage; float16 halves the memory.
        device: of storage; None for the device of the first ``index``.

    Raises:
        TypeError: a width that is not an int; from the first update on, a dtype that is not floating point.
        ValueError: a width below 1.

    Example:
        >>> collector = FeatureCollector(dim=2)
        >>> teacher = {"minilm": torch.rand(1, 5)}  # TeacherAdapter.encode(captions)
        >>> collector.update(torch.tensor([8]), torch.ones(1, 2), torch.ones(1, 2), teacher_features=teacher)
        >>> collector.update(torch.tensor([3]), torch.ones(1, 2), torch.ones(1, 2), teacher_features=teacher)
        >>> collector
        FeatureCollector(2 samples, dim=2, modalities=['image', 'text'], teachers=['minilm'], torch.float32 on cpu)
        >>> collector.bank().index, collector.teachers()["minilm"].dim
        (tensor([8, 3]), 5)

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996: "online episodic training".
    """

    def __init__(self, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> None:
        self.dim, self.dtype, self.device = check.positive_int("dim", dim), dtype, device
        # Parts of rows, joined when they are asked for.
        self._index: list[Tensor] = []
        self._features: dict[str, list[Tensor]] = {}
        self._teachers: list[str] = []
        self._graph_seen = False

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
            TypeError: features that are no floating-point tensors, an index that is not int64.
            ValueError: wrong shapes, or other modalities or teachers than in the first update.
        """
        external = dict(teacher_features or {})
        if taken := external.keys() & {"image", "text", *other_modalities}:
            raise ValueError(f"teacher_features must not be named like a modality, got {sorted(taken)}")
        part = FeatureBank(index, self.dim, dtype=self.dtype, device=self.device)
        part._graph_seen = self._graph_seen
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
        self._teachers, self._graph_seen = given[1], part._graph_seen

    def __len__(self) -> int:
        return sum(map(len, self._index))

    def __repr__(self) -> str:
        modalities = [name for name in self._features if name not in self._teachers]
        return (
            f"FeatureCollector({len(self)} samples, dim={self.dim}, modalities={modalities}, teachers={self._teachers}, "
            f"{self.dtype} on {self.index.device})"
        )

    @property
    def index(self) -> Tensor:
        """(N,) int64, the samples so far."""
        return _joined(self._index) if self._index else torch.zeros(0, dtype=torch.int64, device=self.device or "cpu")

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
        return {"format": 1, "index": self.index, "features": features, "teachers": list(self._teachers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was collected.

        Raises:
            ValueError: a state of another width, or entries that do not fit.
            TypeError: entries of another type.
        """
        check.state_format("FeatureCollector", state)
        check.state_has("FeatureCollector", state, ("index", "features", "teachers"))
        index, features, teachers = state["index"], dict(state["features"]), list(state["teachers"])
        if unknown := sorted(set(teachers) - (features.keys() - {"image", "text"})):
            raise ValueError(f"state_dict['teachers'] must name features that are no modality's, got {unknown}")
        bank = FeatureBank(index, self.dim, dtype=self.dtype, device=self.device)
        written = torch.ones(len(index), dtype=torch.bool, device=index.device)
        bank.load_state_dict({"index": index, "written": written, "features": features})
        self._index, self._features = [bank.index], {name: [x] for name, x in bank.features.items()}
        self._teachers = teachers


def _joined(parts: list[Tensor]) -> Tensor:
    """All rows as one tensor, which replaces its parts in the list so that they are not held twice."""
    if len(parts) > 1:
        parts[:] = [torch.cat(parts)]
    return parts[0]
