"""Which engine runs K-means."""

from collections.abc import Callable

import torch

from . import faiss_engine, torch_engine
from .points import Rows, Run, Settings

ENGINES: dict[str, Callable[[Rows, int, Settings], Run]] = {"faiss": faiss_engine.kmeans, "torch": torch_engine.kmeans}
BACKENDS = ("auto", *ENGINES)


def choose(backend: str, device: torch.device) -> tuple[str, str]:
    """An engine's name, and the reason."""
    if backend != "auto":
        return backend, "asked for"
    # Whatever the size: an engine that is picked by it, or by the number of ranks, would give one answer here and another there.
    return "torch", f"it runs on {device.type} and gives the same answer on any number of ranks"
