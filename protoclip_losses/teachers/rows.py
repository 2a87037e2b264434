"""The rows of a teacher by sample index, as they are stored."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check

BLOCK = 16_384  # rows read at a time


class TeacherRows:
    """Rows (N, D_E) of a tensor or of a memory-mapped array.

    Args:
        stored: the tensor or array.
        index: (N,) int64, the sample of each row; None: row i belongs to sample i.
        normalize: whether rows are L2-normalised when they are read.
    """

    def __init__(self, stored: Any, index: Tensor | None, normalize: bool) -> None:
        self.stored, self.normalize = stored, normalize
        self.samples = None if index is None else index.cpu().sort()

    def __len__(self) -> int:
        return int(self.stored.shape[0])

    @property
    def width(self) -> int:
        """D_E."""
        return int(self.stored.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the rows are: the CPU for an array."""
        return self.stored.device if isinstance(self.stored, Tensor) else torch.device("cpu")

    @property
    def dtype(self) -> str:
        """As which they are stored."""
        return str(self.stored.dtype).removeprefix("torch.")

    def blocks(self) -> Iterator[Tensor]:
        """All rows in blocks. ValueError for one that is not finite."""
        for start in range(0, len(self), BLOCK):
            block = self._read(torch.arange(start, min(start + BLOCK, len(self)), device="cpu"))
            check.finite(f"teacher rows from {start}", block)
            yield block

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows of sample indices (n,), float32 or float64; a sample that the teacher does not have is an IndexError."""
        check.integers("index", index)
        row = index
        bad = (index < 0) | (index >= len(self))
        if self.samples is not None:
            ordered, rows = self.samples
            position = torch.searchsorted(ordered, index.cpu()).clamp(max=len(ordered) - 1)
            row, bad = rows[position], ordered[position] != index.cpu()
        if bool(bad.any()):
            raise IndexError(
                f"index must name samples of the teacher, which has {len(self)} rows: {int(bad.sum())} of {len(index)} are "
                f"outside (sample {int(index[bad.to(index.device)][0])}, for one)"
            )
        return self._read(row)

    def _read(self, row: Tensor) -> Tensor:
        if isinstance(self.stored, Tensor):
            rows = self.stored[row.to(self.stored.device)]
        else:
            block = np.asarray(self.stored[row.cpu().numpy()])
            rows = torch.from_numpy(block.astype(block.dtype.newbyteorder("="), copy=False))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return torch.nn.functional.normalize(rows, dim=1) if self.normalize else rows
