"""The features of an episode's samples, by sample index."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import FLOATS


class FeatureBank:
    """An episode's projected features of every modality, by sample index: the rows that this rank extracts.

    Args:
        index: (N,) int64, this rank's samples.
        dim: width D of image and text features; further modalities have the width they are first given in.
        dtype: of storage; float16 halves the memory.
        device: of storage.

    Example:
        >>> import torch
        >>> bank = FeatureBank(torch.tensor([7, 3]), dim=2)
        >>> bank.update(torch.tensor([3]), torch.ones(1, 2), torch.zeros(1, 2))
        >>> bank.features["image"], bank.missing
        (tensor([[0., 0.],
                [1., 1.]]), 1)
    """

    def __init__(
        self, index: Tensor, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        check.integers("index", index)
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self.index = index.to(index.device if device is None else device)
        self.dim, self.dtype = check.positive_int("dim", dim), dtype
        self.features: dict[str, Tensor] = {}
        self.written = torch.zeros(len(index), dtype=torch.bool, device=self.index.device)
        self._sorted, self._order = self.index.sort(stable=True)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities written so far."""
        return tuple(self.features)

    @property
    def missing(self) -> int:
        """Rows never written."""
        return int((~self.written).sum())

    def require_complete(self) -> None:
        """Raise ValueError, with their count, if rows were never written."""
        if self.missing or not self.features:
            raise ValueError(f"bank must be complete: {self.missing} of {len(self.index)} rows were never written")

    @torch.no_grad()
    def update(self, index: Tensor, image_features: Tensor, text_features: Tensor, **other_modalities: Tensor) -> None:
        """Write the rows of samples ``index`` (n,): features (n, D), L2-normalised by the caller.

        NaN and Inf are stored as they are: :class:`EpisodicClusterer` drops, counts and bounds them.

        Raises:
            IndexError: a sample that is not in the bank.
            ValueError: wrong shapes, or other modalities than in the first update.
        """
        check.integers("index", index)
        given = {"image": image_features, "text": text_features, **other_modalities}
        if self.features and given.keys() != self.features.keys():
            raise ValueError(f"update must be given the modalities {sorted(self.features)} as before, got {sorted(given)}")
        for name, x in given.items():
            width = self.features[name].shape[1] if name in self.features else None
            width = self.dim if name in ("image", "text") else width
            check.matrix(f"{name}_features", x, rows=len(index), width=width, of=" as index and the bank have")
        rows, updates = self._rows(index.to(self.index.device))
        for name, x in given.items():
            if name not in self.features:
                shape = (len(self.index), x.shape[1])
                self.features[name] = torch.zeros(shape, dtype=self.dtype, device=self.index.device)
            self.features[name][rows] = x.to(device=self.index.device, dtype=self.dtype)[updates]
        self.written[rows] = True

    def _rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Every row of the bank that holds one of these samples (a repeated sample has several), and its place in ``index``."""
        first = torch.searchsorted(self._sorted, index)
        count = torch.searchsorted(self._sorted, index, right=True) - first
        if bool((count == 0).any()):
            unknown = index[count == 0]
            raise IndexError(
                f"index must name samples of the bank: {len(unknown)} of {len(index)} are not in it (sample {int(unknown[0])}, "
                "for one)"
            )
        updates = torch.arange(len(index), device=index.device).repeat_interleave(count)
        offset = torch.arange(len(updates), device=index.device) - (count.cumsum(0) - count)[updates]
        return self._order[first[updates] + offset], updates

    def state_dict(self) -> dict[str, Any]:
        """Samples, features and which rows are written."""
        return {"index": self.index, "written": self.written, "features": dict(self.features)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved bank of the same samples; raises ValueError if they are others."""
        if not torch.equal(state["index"].to(self.index.device), self.index):
            raise ValueError("state_dict holds other samples than this bank: index differs")
        for name, x in state["features"].items():
            width = self.dim if name in ("image", "text") else None
            check.matrix(f"{name}_features", x, rows=len(self.index), width=width, of=" as this bank has")
        self.written = state["written"].to(self.index.device, copy=True)
        self.features = {k: v.to(device=self.index.device, dtype=self.dtype, copy=True) for k, v in state["features"].items()}
