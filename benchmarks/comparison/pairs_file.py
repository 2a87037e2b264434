"""The file of a data set: pictures, captions, concepts and labels in one npz archive."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pairs import Pairs, Strings


def read_pairs(path: Path, named: Sequence[str], numbered: Sequence[str] = (), *, made_by: str | None) -> Pairs:
    """The pairs of a file. `named` labels have a list of names there, `numbered` ones have none.

    A missing file raises SystemExit with `made_by`, the commands that make it.
    """
    if not path.exists():
        raise SystemExit(f"{path} does not exist. {made_by}")
    with np.load(path) as file:
        names = {name: [str(x) for x in file[f"{name}_names"]] for name in named}
        labels = {name: torch.from_numpy(file[name]) for name in (*named, *numbered)}
        captions = Strings.of(str(x) for x in file["captions"])
        return Pairs(torch.from_numpy(file["pictures"]), captions, torch.from_numpy(file["concepts"]), labels, names)
