"""Which engine runs K-means."""

from collections.abc import Callable

import torch

from . import faiss_engine, torch_engine
from .rows import Rows, Run, Settings

ENGINES: dict[str, Callable[[Rows, int, Settings], Run]] = {"faiss": faiss_engine.kmeans, "torch": torch_engine.kmeans}
BACKENDS = ("auto", *ENGINES)


def choose(backend: str, device: torch.device) -> tuple[str, str]:
    """An engine's name, and the reason."""
    if backend != "auto":
        return backend, "asked for"
    return "torch", f"the fastest on {device.type}, and every rank keeps its rows"
