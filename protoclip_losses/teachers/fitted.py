"""What was fitted on captions once and kept with their cache: a PCA, or the vocabulary of a :class:`WordEncoder`."""

import errno
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clustering.files import write_atomically
from .files import locked

UNREADABLE = (FileNotFoundError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile)


def fit_once(fit: Callable[[], Mapping[str, Tensor]], cache: Path, paths: Sequence[Path], fitted_on: Mapping[str, Any]) -> None:
    """Fit for a cache and save the tensors, with what they were fitted on, in the first of these files, unless one has them."""
    try:
        load_fitted(paths, fitted_on)
    except FileNotFoundError:
        with locked(cache):  # another process may do the same
            arrays: dict[str, Any] = {name: x.numpy() for name, x in fit().items()}
            arrays["of"] = json.dumps(fitted_on)
            write_atomically(paths[0], lambda file: np.savez(file, **arrays))


def load_fitted(paths: Sequence[Path], fitted_on: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in the first of these files that were fitted on this; FileNotFoundError if there are none."""
    for path in paths:
        # A file that is cut short is as good as none: it is fitted again.
        with suppress(*UNREADABLE), np.load(path, allow_pickle=False) as saved:
            if json.loads(str(saved["of"])) == fitted_on:
                return {name: torch.from_numpy(saved[name]) for name in saved.files if name != "of"}
    raise FileNotFoundError(errno.ENOENT, "nothing was fitted on these captions", str(paths[0]))
