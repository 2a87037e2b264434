"""External teachers: features of every sample, from a file, a tensor or an encoder run once over the captions."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, active_group, rank, validate_on_all_ranks
from .caption_cache import Encode, call_encoder, encode_to_file
from .pca import PCA

BLOCK = 16_384  # rows read at a time


class TeacherAdapter:
    """Features (n, D_E) of an external teacher by sample index.

    Make one with :meth:`from_file`, :meth:`from_tensor` or :meth:`from_encoder`. ``teacher[index]`` takes an int64 tensor of
    sample indices and returns float32 features; ``len(teacher)`` is the number of samples. ``dim`` reduces the width by PCA,
    fitted once over all rows and frozen: read :attr:`dim` for the width that comes out.

    Example:
        >>> import torch
        >>> teacher = TeacherAdapter.from_tensor(torch.eye(4))
        >>> len(teacher), teacher.dim, teacher[torch.tensor([2])]
        (4, 4, tensor([[0., 0., 1., 0.]]))

    Source:
        ProtoCLIP section III-C and IV-A: RoBERTa features, PCA to 64, https://arxiv.org/abs/2206.10996.
    """

    def __init__(
        self,
        rows: Any,
        *,
        index: Tensor | None = None,
        pca: PCA | None = None,
        encode: Encode | None = None,
        normalize: bool = False,
    ) -> None:
        self._rows, self._encode, self.normalize, self.pca = rows, encode, normalize, pca
        self._samples = None if index is None else index.cpu().sort()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], dim: int | None = None, *, normalize: bool = False) -> "TeacherAdapter":
        """A .npy file (N, D_E), float16 or wider, memory-mapped: rows are read when they are asked for.

        Args:
            path: of the file; row i belongs to sample i.
            dim: width after PCA; None leaves the width as it is.
            normalize: L2-normalise rows before PCA.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a 2-D array, dim larger than the width or than the number of rows.
            TypeError: not an array of floats.
        """
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.ndim != 2:
            raise ValueError(f"{os.fspath(path)} must hold a 2-dimensional array (samples, width), got shape {rows.shape}")
        if rows.dtype.kind != "f":
            raise TypeError(f"{os.fspath(path)} must hold floats, got {rows.dtype}")
        return cls._with_pca(rows, dim, normalize=normalize)

    @classmethod
    def from_tensor(
        cls, x: Tensor, dim: int | None = None, *, index: Tensor | None = None, normalize: bool = False
    ) -> "TeacherAdapter":
        """A tensor (N, D_E) already in memory; ``dim`` and ``normalize`` as in :meth:`from_file`.

        ``index`` (N,) names the sample of each row, each once; None: row i belongs to sample i.
        """
        check.matrix("x", x)
        if index is not None:
            check.integers("index", index, length=len(x), of=" as x has rows")
            ordered = index.sort().values
            if repeats := int((ordered[1:] == ordered[:-1]).sum()):
                raise ValueError(f"index must name each sample once, got {repeats} repeats")
        return cls._with_pca(x.detach(), dim, normalize=normalize, index=index)

    @classmethod
    def from_encoder(
        cls,
        encode: Encode,
        texts: Sequence[str],
        cache: str | os.PathLike[str],
        dim: int | None = 64,
        *,
        batch_size: int = 256,
        normalize: bool = True,
        dtype: str = "float16",
        progress: bool | None = None,
        process_group: Group | bool | None = None,
    ) -> "TeacherAdapter":
        """Run an encoder once over the captions, into a memory-mapped file that a second run reuses and a killed one resumes.

        Under torch.distributed the group's first rank encodes and the others wait, which for millions of captions outlasts the
        group's timeout: run it once in one process before training.

        Args:
            encode: list of n captions to (n, D_E) floats.
            texts: N captions; row i belongs to sample i.
            cache: the .npy file; beside it lie ``.json`` (how far it is, of which captions) and ``.pca.npz``.
            dim: width after PCA; None leaves the width as it is.
            batch_size: captions per call of ``encode``.
            normalize: L2-normalise rows before PCA, as the recipe does.
            dtype: of the file, float16 or float32.
            progress: a bar with rate and ETA. None shows it if tqdm is installed.
            process_group: None for the default group, ``False`` for this process alone, or a group.

        Raises:
            ValueError: an encoder that returns another number of rows, or NaN or Inf; a cache made from other captions.
        """
        path = Path(cache)
        group = active_group(process_group)

        def run() -> None:
            captions = check.strings("texts", texts)
            if rank(group) == 0:
                encode_to_file(encode, captions, path, batch_size, dtype, progress)

        validate_on_all_ranks(run, group)
        # A node that does not see the file raises on all ranks.
        rows = validate_on_all_ranks(lambda: np.load(path, mmap_mode="r"), group)
        adapter = cls(rows, encode=encode, normalize=normalize)
        saved = path.with_suffix(".pca.npz")

        def fit() -> None:
            if rank(group) > 0 or dim is None:
                return
            fitted = dict(np.load(saved)) if saved.exists() else {}
            same = {"texts": json.loads(path.with_suffix(".json").read_text())["texts"], "normalize": normalize, "dim": dim}
            if fitted and json.loads(str(fitted["of"])) == same:
                return
            pca = adapter._fit(dim)
            assert pca is not None
            temporary = saved.with_suffix(".tmp.npz")
            np.savez(temporary, mean=pca.mean.numpy(), components=pca.components.numpy(), of=json.dumps(same))
            temporary.replace(saved)

        validate_on_all_ranks(fit, group)
        if dim is not None:
            fitted = validate_on_all_ranks(lambda: dict(np.load(saved)), group)
            adapter.pca = PCA(torch.from_numpy(fitted["mean"]), torch.from_numpy(fitted["components"]))
        return adapter

    @classmethod
    def _with_pca(cls, rows: Any, dim: int | None, *, normalize: bool, index: Tensor | None = None) -> "TeacherAdapter":
        adapter = cls(rows, normalize=normalize, index=index)
        adapter.pca = adapter._fit(dim)
        return adapter

    def _fit(self, dim: int | None) -> PCA | None:
        if dim is None:
            return None
        check.positive_int("dim", dim)
        if dim > min(self._rows.shape):
            raise ValueError(f"dim must be at most the teacher's width and number of rows, {check.shape(self._rows)}, got {dim}")
        return PCA.fit(self._blocks(), dim)

    def _blocks(self) -> Iterator[Tensor]:
        for start in range(0, len(self), BLOCK):
            block = self._raw(torch.arange(start, min(start + BLOCK, len(self))))
            check.finite(f"teacher rows from {start}", block)
            yield block

    def _raw(self, index: Tensor) -> Tensor:
        if isinstance(self._rows, Tensor):
            rows = self._rows[index.to(self._rows.device)]
        else:
            rows = torch.from_numpy(np.asarray(self._rows[index.cpu().numpy()]))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows

    @property
    def dim(self) -> int:
        """Width D_E of the features that come out."""
        return int(self._rows.shape[1]) if self.pca is None else self.pca.components.shape[1]

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Features (n, D_E) of sample indices (n,), float32; a sample that the teacher does not have is an IndexError."""
        check.integers("index", index)
        row = index
        bad = (index < 0) | (index >= len(self))
        if self._samples is not None:
            ordered, rows = self._samples
            place = torch.searchsorted(ordered, index.cpu()).clamp(max=len(ordered) - 1)
            row, bad = rows[place], ordered[place] != index.cpu()
        if bool(bad.any()):
            raise IndexError(
                f"index must name samples of the teacher, which has {len(self)} rows: {int(bad.sum())} of {len(index)} are "
                f"outside (sample {int(index[bad.to(index.device)][0])}, for one)"
            )
        return self._project(self._raw(row))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features (n, D_E) of captions that have no index (streams), through the same normalisation and PCA."""
        if self._encode is None:
            raise ValueError("encode needs a teacher made by TeacherAdapter.from_encoder: a file or a tensor has no encoder")
        rows = torch.from_numpy(call_encoder(self._encode, check.strings("captions", captions))).float()
        return self._project(torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows)

    def _project(self, rows: Tensor) -> Tensor:
        return rows.float() if self.pca is None else self.pca(rows)

    def state_dict(self) -> dict[str, Any]:
        """The frozen PCA; the rows stay where they are."""
        return {} if self.pca is None else {"mean": self.pca.mean, "components": self.pca.components}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a frozen PCA; raises ValueError if it is of another width."""
        if state and state["mean"].shape[0] != self._rows.shape[1]:
            raise ValueError(f"state_dict is of width {state['mean'].shape[0]}, this teacher's rows of {self._rows.shape[1]}")
        self.pca = PCA(state["mean"], state["components"]) if state else None
