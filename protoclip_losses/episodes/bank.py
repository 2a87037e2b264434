"""The features of an episode's samples, by sample index."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import FLOATS


class FeatureBank:
    """An episode's projected features of every modality, by sample index: the rows that this rank extracts.

    ``len(bank)`` is the number of its samples, written or not.

    **Use it when:** the samples of the episode are known beforehand, as those of an :class:`EpisodeSampler` are. Features that
    are all there already make a bank by :meth:`from_features`.
    **Not when:** samples become known as they are read; use :class:`FeatureCollector`.
    **Related:** :func:`extract` fills a bank from a data loader; :class:`EpisodicClusterer` builds prototypes of it.

    Args:
        index: (N,) int64, this rank's samples.
        dim: width D of image and text features; further modalities have the width they are first given in.
        dtype: of storage; float16 halves the memory.
        device: of storage; None for the device of ``index``.

    Raises:
        TypeError: an index that is not an int64 tensor, a dtype that is not floating point.
        ValueError: an index that is not a vector, a width below 1.

    Example:
        >>> import torch
        >>> bank = FeatureBank(torch.tensor([7, 3]), dim=2)
        >>> bank.update(torch.tensor([3]), torch.ones(1, 2), torch.zeros(1, 2))
        >>> bank.features["image"], bank.missing
        (tensor([[0., 0.],
                [1., 1.]]), 1)
        >>> bank
        FeatureBank(2 samples, dim=2, modalities=['image', 'text'], missing=1, torch.float32 on cpu)

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996: features of an episode, extracted before its training.
    """

    def __init__(
        self, index: Tensor, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        check.integers("index", index)
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        # A copy: of a view, the whole tensor would be kept and saved.
        self.index = index.to(index.device if device is None else device, copy=True)
        self.dim, self.dtype = check.positive_int("dim", dim), dtype
        self.features: dict[str, Tensor] = {}
        self.written = torch.zeros(len(index), dtype=torch.bool, device=self.index.device)
        # On the CPU, where loaders give the numbers of a batch: looked up there, they make no device wait.
        self._sorted, self._order = (index if index.is_cpu or index.is_meta else index.cpu()).sort(stable=True)
        self._graph_seen = False

    @classmethod
    def from_features(
        cls, index: Tensor, image: Tensor, text: Tensor, *, dtype: torch.dtype = torch.float32, **others: Tensor
    ) -> "FeatureBank":
        """A complete bank of features that are there already, on their device.

        Args:
            index: (N,) int64, the sample of each row.
            image: (N, D), L2-normalised by the caller.
            text: (N, D).
            dtype: of storage, whatever the features' own is.
            others: (N, width) of further modalities, by name.

        Raises:
            TypeError, ValueError: as :meth:`update`.

        Example:
            >>> import torch
            >>> rows = torch.nn.functional.normalize(torch.randn(3, 2), dim=1)
            >>> bank = FeatureBank.from_features(torch.tensor([5, 1, 9]), image=rows, text=rows)
            >>> len(bank), bank.missing
            (3, 0)
        """
        check.matrix("image_features", image)
        bank = cls(index, image.shape[1], dtype=dtype, device=image.device)
        bank.update(index, image, text, **others)
        return bank

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        missing = "unknown" if self.written.is_meta else self.missing
        return (
            f"FeatureBank({len(self)} samples, dim={self.dim}, modalities={list(self.modalities)}, missing={missing}, "
            f"{self.dtype} on {self.index.device})"
        )

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
        if not self.features:
            raise ValueError(f"bank must be complete: no features were written for any of its {len(self)} rows")
        if self.missing:
            raise ValueError(f"bank must be complete: {self.missing} of {len(self)} rows were never written")

    @torch.no_grad()
    def update(self, index: Tensor, image_features: Tensor, text_features: Tensor, **other_modalities: Tensor) -> None:
        """Write the rows of samples ``index`` (n,): features (n, D), L2-normalised by the caller.

        With an ``index`` on the CPU nothing is read back from the device of the features and the bank.

        NaN and Inf are stored as they are: :class:`EpisodicClusterer` drops, counts and bounds them. Features that carry a
        graph are stored without it, with a warning: extraction belongs under ``torch.no_grad()``.

        Raises:
            IndexError: a sample that is not in the bank.
            TypeError: features that are no floating-point tensors, an index that is not int64.
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
        rows, updates = (x.to(self.index.device, non_blocking=True) for x in self._rows(index.to(self._sorted.device)))
        self._graph_seen = self._graph_seen or warn_of_graph(given)
        for name, x in given.items():
            if name not in self.features:
                shape = (len(self.index), x.shape[1])
                self.features[name] = torch.zeros(shape, dtype=self.dtype, device=self.index.device)
            self.features[name][rows] = x.to(device=self.index.device, dtype=self.dtype)[updates]
        self.written[rows] = True

    def _rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Every row of the bank that holds one of these samples (a repeated one has several), and its position in ``index``."""
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
        # Copies of the small tensors: torch.distributed.checkpoint reads into those it is given, before anything is checked.
        # Names of modalities are saved apart: it skips, in silence, features that a fresh bank does not have yet.
        state = {"index": self.index.clone(), "written": self.written.clone(), "features": dict(self.features)}
        return {"format": 1, **state, "modalities": list(self.features)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved bank of the same samples.

        Raises:
            ValueError: a state of other samples or widths, one in which features are missing, or entries that do not fit.
            TypeError: entries of another type.
        """
        features, written = self._checked(state)
        self.written = written.to(self.index.device, copy=True)
        self.features = {k: v.to(device=self.index.device, dtype=self.dtype, copy=True) for k, v in features.items()}

    def _checked(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        named = ["modalities"] if check.state_format("FeatureBank", state) > 0 else []  # 0.6 did not save them
        check.state_has("FeatureBank", state, ["index", "written", "features", *named])
        index, written, features = state["index"], state["written"], dict(state["features"])
        check.integers("state_dict['index']", index)
        if not torch.equal(index.to(self.index.device), self.index):
            raise ValueError("state_dict holds other samples than this bank: index differs")
        if not isinstance(written, Tensor) or written.dtype != torch.bool:
            got = written.dtype if isinstance(written, Tensor) else type(written).__name__
            raise TypeError(f"state_dict['written'] must be a bool tensor, got {got}")
        if written.shape != index.shape:
            wanted, got = check.shape(index), check.shape(written)
            raise ValueError(f"state_dict['written'] must have shape {wanted} as index has, got {got}")
        names = list(state["modalities"]) if named else list(features)
        if features.keys() != set(names) or (features and not {"image", "text"} <= features.keys()):
            raise ValueError(f"state_dict must hold the features of {names or ['image', 'text']}, got {list(features)}")
        if not features and bool(written.any()):
            raise ValueError(f"state_dict must hold features of the {int(written.sum())} rows that it calls written, got none")
        for name, x in features.items():
            width = self.dim if name in ("image", "text") else None
            check.matrix(f"{name}_features", x, rows=len(self.index), width=width, of=" as this bank has")
        return features, written


def warn_of_graph(features: Mapping[str, Tensor]) -> bool:
    """Whether features carry a graph, which is said once for a bank and keeps every activation until it is freed."""
    graph = [name for name, x in features.items() if x.grad_fn is not None]
    if graph:
        warnings.warn(
            f"features {graph} were computed with gradients: extract under torch.no_grad(), which needs less memory",
            stacklevel=4,  # update's caller: torch.no_grad's wrapper lies between
        )
    return bool(graph)
