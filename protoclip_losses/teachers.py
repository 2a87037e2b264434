"""External teachers: features of every sample, from a file, a tensor or an encoder run once over the captions."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks as check
from .distributed import active_group, agree, rank
from .pca import PCA

Encode = Callable[[list[str]], "Tensor | np.ndarray[Any, Any]"]
Rows = "Tensor | np.ndarray[Any, Any]"

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

    def __init__(self, rows: Any, *, pca: PCA | None = None, encode: Encode | None = None, normalize: bool = False) -> None:
        self._rows, self._encode, self.normalize, self.pca = rows, encode, normalize, pca

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
    def from_tensor(cls, x: Tensor, dim: int | None = None, *, normalize: bool = False) -> "TeacherAdapter":
        """A tensor (N, D_E) already in memory; ``dim`` and ``normalize`` as in :meth:`from_file`."""
        check.matrix("x", x)
        return cls._with_pca(x.detach(), dim, normalize=normalize)

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

        Raises:
            ValueError: an encoder that returns another number of rows, or NaN or Inf; a cache made from other captions.
        """
        path = Path(cache)
        group = active_group(None)

        def run() -> None:
            if rank(group) == 0:
                _encode_to_file(encode, texts, path, batch_size, dtype, progress)

        agree(run, group)
        adapter = cls(np.load(path, mmap_mode="r"), encode=encode, normalize=normalize)
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

        agree(fit, group)
        if dim is not None:
            fitted = np.load(saved)
            adapter.pca = PCA(torch.from_numpy(fitted["mean"]), torch.from_numpy(fitted["components"]))
        return adapter

    @classmethod
    def _with_pca(cls, rows: Any, dim: int | None, *, normalize: bool) -> "TeacherAdapter":
        adapter = cls(rows, normalize=normalize)
        adapter.pca = adapter._fit(dim)
        return adapter

    def _fit(self, dim: int | None) -> PCA | None:
        if dim is None:
            return None
        check.positive_int("dim", dim)
        if dim > min(self._rows.shape):
            raise ValueError(f"dim must be at most the teacher's width and number of rows, {self._rows.shape}, got {dim}")
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
        bad = (index < 0) | (index >= len(self))
        if bool(bad.any()):
            raise IndexError(
                f"index must name samples of the teacher, which has {len(self)} rows: {int(bad.sum())} of {len(index)} are "
                f"outside (sample {int(index[bad][0])}, for one)"
            )
        return self._project(self._raw(index))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features (n, D_E) of captions that have no index (streams), through the same normalisation and PCA."""
        if self._encode is None:
            raise ValueError("encode needs a teacher made by TeacherAdapter.from_encoder: a file or a tensor has no encoder")
        rows = torch.from_numpy(_call(self._encode, list(captions))).float()
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


def _call(encode: Encode, captions: list[str]) -> "np.ndarray[Any, Any]":
    """Run the encoder and check what it returns."""
    with torch.no_grad():
        out = encode(captions)
    rows = out.detach().float().cpu().numpy() if isinstance(out, Tensor) else np.asarray(out, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(captions):
        raise ValueError(f"encode must return ({len(captions)}, width) for {len(captions)} captions, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(1)).argmax())
        raise ValueError(f"encode must return finite features, got NaN or Inf for the caption {captions[bad]!r}")
    return rows


def _encode_to_file(encode: Encode, texts: Sequence[str], path: Path, batch_size: int, dtype: str, progress: bool | None) -> None:
    """Fill ``path`` with the encoder's rows of ``texts``, from where an earlier run stopped."""
    check.positive_int("batch_size", batch_size)
    if len(texts) == 0:
        raise ValueError("texts must hold at least one caption, got none")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    record = path.with_suffix(".json")
    done = 0
    if record.exists() and path.exists():
        state = json.loads(record.read_text())
        if state["texts"] != digest:
            raise ValueError(f"cache {path} was made from other texts ({state['count']} of them): delete it or name another file")
        done = int(state["done"])
        if 0 < done < len(texts) and state["dtype"] != dtype:
            raise ValueError(f"cache {path} was begun in {state['dtype']}, got dtype={dtype!r}: delete it or name another file")
    if done == len(texts):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.lib.format.open_memmap(path, mode="r+") if done else None
    for start in _progress(range(done, len(texts), batch_size), progress, done, len(texts), batch_size):
        block = _call(encode, list(texts[start : start + batch_size]))
        if rows is None:
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(len(texts), block.shape[1]))
        if np.abs(block).max() > np.finfo(dtype).max:
            raise ValueError(f"encode returned {np.abs(block).max():.3g}, which overflows {dtype}: pass dtype='float32'")
        rows[start : start + len(block)] = block
        rows.flush()
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"texts": digest, "count": len(texts), "done": start + len(block), "dtype": dtype}))
        temporary.replace(record)


def _progress(starts: range, show: bool | None, done: int, total: int, batch_size: int) -> Iterator[int]:
    if show is False:
        yield from starts
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        if show:
            raise ImportError("progress=True needs tqdm: pip install 'protoclip-losses[progress]'") from error
        yield from starts
        return
    with tqdm(desc="teacher", unit=" captions", initial=done, total=total) as bar:
        for start in starts:
            yield start
            bar.update(min(batch_size, total - start))
