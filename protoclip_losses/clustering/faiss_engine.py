"""K-means by faiss, on CPU or, where the installed faiss has it, on one GPU."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def load_faiss() -> Any:
    """The faiss module, or an error that says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("K-means needs faiss: pip install faiss-cpu") from error
    return faiss


def kmeans(
    features: Tensor, num_prototypes: int, *, niter: int, nredo: int, spherical: bool, seed: int, device: torch.device
) -> Tensor:
    """Centroids (K, D) float32 of features (N, D). All N points are used, none is added noise to, threads are left as found.

    faiss's own defaults would use at most 256 points per centroid without a word, and warn on stderr below 39.
    """
    faiss = load_faiss()
    gpu: bool | int = False
    if device.type == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            raise RuntimeError(
                f"device={str(device)!r} asks faiss for a GPU but the installed faiss {faiss.__version__} has no GPU support: "
                "pip uninstall faiss-cpu && pip install faiss-gpu-cu12 (they install the same module), or use device='cpu'"
            )
        gpu = 1  # the number of GPUs; which one is set by the current device below
    if features.shape[1] == 0:
        raise ValueError("features must have a width of at least 1, got 0")
    wide = features.detach().float()
    largest = float(wide.abs().max())  # Inf where a float64 overflowed
    if not largest < 1e18 / features.shape[1] ** 0.5:
        raise ValueError(f"features must be small enough for float32 to hold their squared distances, got {largest:.3g}")
    # Far from the origin faiss's expanded squares hold no digits of a distance; directions have no other origin.
    origin = torch.zeros(wide.shape[1], device=wide.device) if spherical else wide.mean(0)
    points = np.ascontiguousarray((wide - origin).cpu().numpy())
    engine = faiss.Kmeans(
        points.shape[1],
        num_prototypes,
        niter=niter,
        nredo=nredo,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=points.shape[0],
        verbose=False,
        gpu=gpu,
    )
    if gpu:
        with torch.cuda.device(device):
            engine.train(points)
    else:
        engine.train(points)
    return torch.from_numpy(np.array(engine.centroids)) + origin.cpu()
