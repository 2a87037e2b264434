"""Rows that need not fit in memory: memory-mapped arrays or a stream of blocks, read in order and never all at once."""

import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._dtypes import FLOATS
from ..kernels.sizes import rows_per_copy

STRIPE_ROWS = 2**20  # rows whose ids are listed at a time: a list of all would take as much as their labels
Part = slice | Tensor  # of the rows: consecutive ones, or ids in ascending order


class RowSource(ABC):
    """Rows (N, D) of some storage. Blocks come out on ``device``, float64 as float32.

    ``kept`` are the ids in the storage that count as rows 0, 1, ...; None: all of them.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype) -> None:
        self.count, self.width, self.dtype = count, width, dtype
        self.device: torch.device = torch.device("cpu")
        self.kept: Tensor | None = None

    @property
    def read_rows(self) -> int:
        """Rows of the storage that are read at a time."""
        return rows_per_copy(self.width, torch.device("cpu"))

    def __len__(self) -> int:
        return self.count if self.kept is None else len(self.kept)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return len(self), self.width

    def read(self, parts: Iterable[Part]) -> Iterator[tuple[Part, Tensor]]:
        """Each part, which comes after the one before it, with its rows."""
        asked: list[Part] = []

        def stored() -> Iterator[Part]:
            for part in parts:
                asked.append(part)
                if self.kept is not None:
                    yield self.kept[part if isinstance(part, slice) else part.to(self.kept.device)]
                else:
                    yield part if isinstance(part, slice) else part.cpu()

        for block in self._read(stored()):
            block = block.to(self.device)
            yield asked.pop(), block.float() if block.dtype == torch.float64 else block

    @abstractmethod
    def raw_blocks(self) -> Iterator[Tensor]:
        """All rows of the storage as they are, in blocks."""

    @abstractmethod
    def _read(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        """The rows of each part of the storage."""


class ArrayRows(RowSource):
    """Arrays or tensors that follow each other, most likely memory-mapped ones: what is asked for is read, and nothing else."""

    def __init__(self, name: str, arrays: Sequence[Any]) -> None:
        self.arrays = [_as_tensor(array) for array in arrays]
        for x in self.arrays:
            if x.dim() != 2:
                raise ValueError(f"{name} must have 2 dimensions (rows, width), got shape {tuple(x.shape)}")
            if _kind(x) != _kind(self.arrays[0]):
                raise ValueError(f"{name} must hold arrays of one width and dtype, got {_kind(self.arrays[0])} and {_kind(x)}")
        super().__init__(sum(map(len, self.arrays)), self.arrays[0].shape[1], self.arrays[0].dtype)
        self.ends = list(accumulate(map(len, self.arrays)))

    def raw_blocks(self) -> Iterator[Tensor]:
        for array in self.arrays:
            yield from torch.split(array, self.read_rows) if len(array) else ()

    def _read(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        for part in parts:
            yield _concatenate([self.arrays[i][inside] for i, inside in self._pieces(part)], self)

    def _pieces(self, part: Part) -> Iterator[tuple[int, Part]]:
        """Which rows of which array."""
        ids = None if isinstance(part, slice) else part
        position, stop = (part.start, part.stop) if isinstance(part, slice) else (0, len(part))
        while position < stop:
            first = position if ids is None else int(ids[position])
            number = bisect_right(self.ends, first)
            start, end = self.ends[number] - len(self.arrays[number]), self.ends[number]
            if ids is None:
                following = min(end, stop)
                yield number, slice(position - start, following - start)
            else:
                following = int(torch.searchsorted(ids, end))
                last = int(ids[following - 1])
                if last - first == following - 1 - position:  # a view of the file, and no copy of its rows
                    yield number, slice(first - start, last - start + 1)
                else:
                    yield number, ids[position:following] - start
            position = following


class StreamRows(RowSource):
    """Blocks of rows that an iterable gives each time it is iterated: each pass reads them from the first on."""

    def __init__(self, name: str, blocks: Iterable[Any]) -> None:
        self.name, self.blocks = name, blocks
        first, count = None, 0
        for block in self._checked():
            first, count = block if first is None else first, count + len(block)
        if first is None:
            raise ValueError(f"{name} must give at least one block of rows, got none")
        super().__init__(count, first.shape[1], first.dtype)

    def _checked(self) -> Iterator[Tensor]:
        """The blocks of one pass."""
        wanted = ""
        for block in self.blocks:
            block = _as_tensor(block)
            if block.dim() != 2:
                raise ValueError(f"{self.name} must give blocks of 2 dimensions (rows, width), got shape {tuple(block.shape)}")
            if _kind(block) != (wanted := wanted or _kind(block)):
                raise ValueError(f"{self.name} must give blocks of one width and dtype, got {wanted} and {_kind(block)}")
            yield block

    def raw_blocks(self) -> Iterator[Tensor]:
        for block in self._checked():
            yield from torch.split(block, self.read_rows) if len(block) else ()

    def _read(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        blocks, block, start, end = self._checked(), torch.empty(0), 0, 0
        for part in parts:
            ids = torch.arange(part.start, part.stop, device="cpu") if isinstance(part, slice) else part
            pieces, position = [], 0
            while position < len(ids):
                if int(ids[position]) >= end:
                    block = next(blocks, torch.empty(0))
                    if block.dim() != 2:
                        raise ValueError(f"{self.name} must give the same rows each time, got {end} after {self.count} before")
                    start, end = end, end + len(block)
                    continue
                following = int(torch.searchsorted(ids, end))
                pieces.append(block[(ids[position:following] - start).to(block.device)])
                position = following
            yield _concatenate(pieces, self)


def _concatenate(pieces: Sequence[Tensor], source: RowSource) -> Tensor:
    if not pieces:
        return torch.empty((0, source.width), dtype=source.dtype)
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _as_tensor(array: Any) -> Tensor:
    """A tensor in the memory of an array, also of one that is mapped read-only: nothing here writes to it."""
    if isinstance(array, Tensor):
        return array.detach()
    if not isinstance(array, np.ndarray):
        raise TypeError(f"a block of rows must be a NumPy array or a torch.Tensor, got {type(array).__name__}")
    array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.asarray(array))


def _kind(x: Tensor) -> str:
    return f"(n, {x.shape[1]}) of {x.dtype}"


def row_source(name: str, x: Any) -> RowSource | None:
    """The rows of an array, of a list of arrays or tensors, or of a re-iterable of blocks; None for anything else.

    Raises:
        TypeError: what can be iterated only once, rows that are not floats.
        ValueError: arrays that are not 2-dimensional or of different widths or dtypes.
    """
    arrays: list[Any] | None = None
    if isinstance(x, np.ndarray):
        arrays = [x]
    elif isinstance(x, (list, tuple)):
        if not x or not all(isinstance(part, (np.ndarray, Tensor)) for part in x):
            return None
        arrays = list(x)
    elif isinstance(x, (Tensor, str, bytes, dict)) or not hasattr(x, "__iter__"):
        return None
    elif hasattr(x, "__next__"):
        raise TypeError(f"{name} must be iterable more than once, as it is read several times, got a {type(x).__name__}")
    for array in arrays or ():
        if isinstance(array, np.ndarray) and (array.dtype.kind != "f" or array.itemsize > 8):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {array.dtype}")
    source = StreamRows(name, x) if arrays is None else ArrayRows(name, arrays)
    if source.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {source.dtype}")
    return source


def read_blocks(
    points: Tensor | RowSource, rows: Iterable[Tensor] | None = None, step: int | None = None
) -> Iterator[tuple[Part, Tensor]]:
    """Blocks of at most ``step`` points (n, D), with the part of the points that they are.

    Args:
        points: what is read.
        rows: lists of ids, each ascending and after the one before it; None for all points.
        step: points in a block; None: as many as the table of sizes has for their device.
    """
    step = step or rows_per_copy(points.shape[1], points.device)
    parts: Iterable[Part]
    if rows is None:
        parts = (slice(start, min(start + step, len(points))) for start in range(0, len(points), step))
    else:
        parts = (part for ids in rows if len(ids) for part in torch.split(ids, step))
    if isinstance(points, RowSource):
        yield from points.read(parts)
    else:
        for part in parts:
            yield part, points[part]


def stripes(count: int) -> Iterator[slice]:
    """Parts of ``count`` rows: what is computed of one at a time holds temporary vectors of it alone."""
    return (slice(start, min(start + STRIPE_ROWS, count)) for start in range(0, count, STRIPE_ROWS))


def chosen_rows(mask: Tensor) -> Iterator[Tensor]:
    """Where a mask (n,) is True, as lists of ids that are made when they are wanted."""
    for part in stripes(len(mask)):
        ids = mask[part].nonzero()[:, 0]
        yield ids + part.start if part.start else ids
