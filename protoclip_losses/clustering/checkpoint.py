"""The state of a K-means run between two iterations, in files: what a killed process goes on from."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..distributed import Group, gather_strings, rank, validate_on_all_ranks, world_size
from .files import checksum, companion, read_tensors, write_tensors
from .row_source import RowSource, read_blocks

KIND = "KMeans.fit(checkpoint=...)"


class Checkpoint:
    """One file of this rank; with several ranks two that take turns.

    A rank is killed before or after it wrote its file, so that with several ranks the last states may be one iteration apart. All
    ranks have the one before.

    Args:
        path: of the file, for one process; ranks add their number.
        facts: of the data and the settings, by name: only the same ones may go on.
        group: None for one process.
    """

    def __init__(self, path: Path, facts: Mapping[str, object], group: Group | None) -> None:
        self.path, self.group = path, group
        self.facts = {name: str(value) for name, value in facts.items()}
        ranks = world_size(group)
        self.files = [path] if ranks == 1 else [companion(path, f".rank{rank(group)}of{ranks}.{turn}") for turn in (0, 1)]

    def write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the older of this rank's files."""
        facts = {"kind": KIND, "format": 1, "step": step, "facts": self.facts}
        write_tensors(self.files[step % len(self.files)], tensors, facts)

    def read(self) -> dict[str, Tensor] | None:
        """The last state that all ranks have, None if there is none.

        Raises:
            ValueError: a file of other data or settings, or of another number of ranks, or one that is no checkpoint.
        """
        own = validate_on_all_ranks(self._read_files, self.group)
        steps = [set(json.loads(text)) for text in gather_strings(json.dumps(list(own)), self.group)]
        common = set.intersection(*steps)
        return own[max(common)] if common else None

    def _read_files(self) -> dict[int, dict[str, Tensor]]:
        ranks = world_size(self.group)
        others = [self.path] if ranks > 1 else []
        others += [file for file in self.path.parent.glob("*.rank*of*.[01]") if file.name.startswith(f"{self.path.name}.rank")]
        for file in others:
            if file.exists() and (ranks == 1 or f"of{ranks}." not in file.name):
                raise ValueError(f"checkpoint must be of {ranks} processes as there are now, got {file.name} of another number")
        found = {}
        for file in self.files:
            if file.exists():
                tensors, header = read_tensors(file, KIND)
                saved = header["facts"]
                names = [name for name in {**saved, **self.facts} if saved.get(name) != self.facts.get(name)]
                if names:
                    values = "; ".join(f"{name}: {saved.get(name)}, now {self.facts.get(name)}" for name in names)
                    raise ValueError(f"checkpoint must be of the same data and settings, got {file} with {values}")
                found[header["step"]] = tensors
        return found

    def remove(self) -> None:
        """Delete this rank's files."""
        for file in self.files:
            file.unlink(missing_ok=True)


def rows_checksum(points: Tensor | RowSource) -> str:
    """Of all rows, read in blocks."""
    number = 0
    for _, block in read_blocks(points):
        number = checksum(block, start=number)
    return f"{number:08x}"


def tensor_checksum(x: Tensor | None) -> str:
    """Of one more argument, which may be None."""
    return "none" if x is None else f"{checksum(x):08x}"
