"""External teachers: features of every sample, from a file, a tensor or an encoder run once over the captions."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, active_group, rank, validate_on_all_ranks
from .caption_cache import Encode, call_encoder, complete_cache, encode_to_file
from .files import companion, open_rows
from .pca import PCA, fit_once, load_pca, pca_from_state

BLOCK = 16_384  # rows read at a time


class TeacherAdapter:
    """Features (n, D_E) of an external teacher by sample index.

    Make one with :meth:`from_file`, :meth:`from_tensor` or :meth:`from_encoder`. ``teacher[index]`` takes an int64 tensor of
    sample indices and returns float32 features; ``len(teacher)`` is the number of samples. ``dim`` reduces the width by PCA,
    fitted once over all rows and frozen: read :attr:`dim` for the width that comes out.

    **Use it when:** prototypes should follow the clusters of another model, such as a sentence encoder of the captions.
    **Not when:** only image and text features of the model in training are clustered: build without teachers.
    **Related:** :class:`EpisodicClusterer`, whose ``build`` takes teachers; :class:`FeatureCollector` makes those of a stream.

    Example:
        >>> import torch
        >>> teacher = TeacherAdapter.from_tensor(torch.eye(4))
        >>> len(teacher), teacher.dim, teacher[torch.tensor([2])]
        (4, 4, tensor([[0., 0., 1., 0.]]))
        >>> teacher
        TeacherAdapter(4 samples, dim=4, float32)

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
            ValueError: another kind of file, not a 2-D array, dim larger than the width or than the number of rows.
            TypeError: not an array of floats.
        """
        return cls._with_pca(open_rows(path), dim, normalize=normalize)

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

        A cache that is there already costs one caption: the first is encoded again, as the cache may be another encoder's.
        A process that finds another one writing the cache waits for it.

        Under torch.distributed the group's first rank encodes and the others wait, which for millions of captions outlasts the
        group's timeout: run it once in one process before training.

        Args:
            encode: list of n captions to (n, D_E) floats, the same whenever it is asked.
            texts: N captions; row i belongs to sample i.
            cache: the .npy file. With ``caps.npy`` come ``caps.npy.json`` (how far it is, of which captions),
                ``caps.npy.pca.npz``, and ``caps.npy.lock`` while it is written.
            dim: width after PCA; None leaves the width as it is.
            batch_size: captions per call of ``encode``.
            normalize: L2-normalise rows before PCA, as the recipe does.
            dtype: of the file, float16 or float32.
            progress: a bar with rate and ETA. None shows it if tqdm is installed.
            process_group: None for the default group, ``False`` for this process alone, or a group.

        Raises:
            TypeError: an encoder that returns anything but rows of numbers, texts that are no list of strings.
            ValueError: an encoder that returns another number of rows or another width than before, or NaN or Inf; a cache
                made from other captions, by another encoder or in another dtype, or a damaged one.
            OSError: what the file system says, such as a full disk, with the name of the file.
        """
        path, group = Path(cache), active_group(process_group)

        def run() -> list[str]:
            captions = check.strings("texts", texts)
            if dim is not None:
                check.positive_int("dim", dim)
            if rank(group) == 0:
                encode_to_file(encode, captions, path, batch_size, dtype, progress)
            return captions

        captions = validate_on_all_ranks(run, group)
        # A node that does not see the files, or sees others, raises on all ranks.
        record, rows = validate_on_all_ranks(lambda: complete_cache(path, captions, dtype), group)
        cached = {"rows of the cache": (rows.shape, zlib.crc32(rows[0].tobytes()))}
        validate_on_all_ranks(lambda: None, group, signature=lambda: cached)
        adapter = cls(rows, encode=encode, normalize=normalize)
        if dim is None:
            return adapter
        fitted_on = {"texts": record.texts, "normalize": normalize, "dim": dim}
        # A cache that 0.6 completed keeps the PCA that 0.6 fitted.
        files = [companion(path, ".pca.npz"), *([path.with_suffix(".pca.npz")] if record.format == 0 else [])]

        def fit() -> None:
            if rank(group) == 0:
                fit_once(lambda: adapter._fit(dim), path, files, fitted_on)

        validate_on_all_ranks(fit, group)
        adapter.pca = validate_on_all_ranks(lambda: load_pca(files, fitted_on), group)
        return adapter

    @classmethod
    def _with_pca(cls, rows: Any, dim: int | None, *, normalize: bool, index: Tensor | None = None) -> "TeacherAdapter":
        adapter = cls(rows, normalize=normalize, index=index)
        adapter.pca = None if dim is None else adapter._fit(dim)
        return adapter

    def _fit(self, dim: int) -> PCA:
        check.positive_int("dim", dim)
        if dim > min(self._rows.shape):
            raise ValueError(f"dim must be at most the teacher's width and number of rows, {check.shape(self._rows)}, got {dim}")
        return PCA.fit(self._blocks(), dim)

    def _blocks(self) -> Iterator[Tensor]:
        for start in range(0, len(self), BLOCK):
            block = self._raw(torch.arange(start, min(start + BLOCK, len(self)), device="cpu"))
            check.finite(f"teacher rows from {start}", block)
            yield block

    def _raw(self, index: Tensor) -> Tensor:
        if isinstance(self._rows, Tensor):
            rows = self._rows[index.to(self._rows.device)]
        else:
            block = np.asarray(self._rows[index.cpu().numpy()])
            rows = torch.from_numpy(block.astype(block.dtype.newbyteorder("="), copy=False))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows

    @property
    def dim(self) -> int:
        """Width D_E of the features that come out."""
        return int(self._rows.shape[1]) if self.pca is None else self.pca.components.shape[1]

    def __repr__(self) -> str:
        parts = [f"{len(self)} samples", f"dim={self.dim}", str(self._rows.dtype).removeprefix("torch.")]
        parts += [] if self.pca is None else [str(self.pca)]
        parts += ["normalize=True"] if self.normalize else []
        return f"TeacherAdapter({', '.join(parts)})"

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Features (n, D_E) of sample indices (n,), float32; a sample that the teacher does not have is an IndexError."""
        check.integers("index", index)
        row = index
        bad = (index < 0) | (index >= len(self))
        if self._samples is not None:
            ordered, rows = self._samples
            position = torch.searchsorted(ordered, index.cpu()).clamp(max=len(ordered) - 1)
            row, bad = rows[position], ordered[position] != index.cpu()
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
        texts = check.strings("captions", captions)
        if not texts:
            return torch.zeros((0, self.dim), dtype=torch.float32, device="cpu")
        rows = torch.from_numpy(call_encoder(self._encode, texts, int(self._rows.shape[1]))).float()
        return self._project(torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows)

    def _project(self, rows: Tensor) -> Tensor:
        return rows.float() if self.pca is None else self.pca(rows)

    def state_dict(self) -> dict[str, Any]:
        """The frozen PCA, None for its width where there is none; the rows stay where they are."""
        if self.pca is None:
            return {"format": 1, "dim": None, "normalize": self.normalize}
        pca = {"mean": self.pca.mean, "components": self.pca.components}
        return {"format": 1, "dim": self.dim, "normalize": self.normalize, **pca}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a frozen PCA.

        Raises:
            ValueError: a PCA of another width, or of rows that were normalised where these are not.
            TypeError: a PCA that is not of floats.
        """
        if check.state_format("TeacherAdapter", state) > 0:
            check.state_matches("TeacherAdapter", state, {"normalize": self.normalize})
            check.state_has("TeacherAdapter", state, ["dim"])
        if state.get("dim", state.get("mean")) is None:  # 0.6 saved a PCA alone, and nothing where there was none
            self.pca = None
        else:
            device = self._rows.device if isinstance(self._rows, Tensor) else torch.device("cpu")
            self.pca = pca_from_state("TeacherAdapter", state, self._rows.shape[1], device)
