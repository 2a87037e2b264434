"""The metrics of a run, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor


class Metrics:
    """metrics.jsonl and TensorBoard, written by rank 0.

    The state is the size of the file: a resumed run drops what was written after the checkpoint and writes it again.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.last_loss = float("nan")
        self._file: BinaryIO | None = None
        self._board: Any = None
        self._kept_bytes, self._last_step = 0, -1

    def write(self, step: int, episode: int, learning_rate: float, values: dict[str, Tensor]) -> None:
        """Write one line with the means over ranks. Collective: every rank calls it."""
        row = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(row)
            row /= self.world_size
        numbers = dict(zip(values, row.tolist(), strict=True))
        self.last_loss = numbers["loss"]
        if not math.isfinite(self.last_loss):
            raise SystemExit(
                f"the loss must be finite, got {self.last_loss} after step {step}: lower --learning-rate, or use a higher "
                f"--precision. The last checkpoint is in {self.run_dir}"
            )
        if self.rank == 0:
            file, board = self._open()
            line = {"step": step, "episode": episode, "learning_rate": learning_rate, **numbers}
            file.write(json.dumps(line).encode() + b"\n")
            for name, number in numbers.items():
                board.add_scalar(name, number, step)
            self._last_step = step

    def log_scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """Write numbers that exist once per episode to TensorBoard, as `prefix/name`; those of rank 0."""
        if self.rank == 0:
            _, board = self._open()
            for name, number in values.items():
                board.add_scalar(f"{prefix}/{name}", number, step)
            self._last_step = step

    def state_dict(self) -> dict[str, int]:
        """How much has been written, all of which is on disk then."""
        if self.rank == 0:
            file, board = self._open()
            board.flush()
            file.flush()
            os.fsync(file.fileno())
            self._kept_bytes = file.tell()
        return {"bytes": self._kept_bytes, "step": self._last_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._kept_bytes, self._last_step = state["bytes"], state["step"]

    def close(self) -> None:
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()

    def _open(self) -> tuple[BinaryIO, Any]:
        """Open both files at the first use, without what an interrupted run has written after its checkpoint."""
        if self._file is None:
            from torch.utils.tensorboard import SummaryWriter

            self._file = open(self.run_dir / "metrics.jsonl", "ab")  # noqa: SIM115  closed by close()
            self._file.truncate(self._kept_bytes)
            self._file.seek(0, os.SEEK_END)  # tell() would still be at the old end
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._last_step + 1)
        return self._file, self._board
