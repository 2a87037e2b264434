"""K-means by faiss, on CPU or, where the installed faiss has it, on one GPU."""

import zlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import broadcast, rank, validate_on_all_ranks
from .points import Rows, Run, Settings


def load_faiss() -> Any:
    """The faiss module, or an error that says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("K-means needs faiss: pip install faiss-cpu") from error
    return faiss


def kmeans(rows: Rows, num_prototypes: int, settings: Settings) -> Run:
    """K-means of all ranks' rows on the group's first rank; the others wait for its centroids, or for its error."""
    points = rows.in_order()
    niter = settings.niter
    news = torch.zeros(num_prototypes * points.shape[1] + niter + 1, dtype=torch.float64)

    def run() -> Tensor:
        if rank(rows.ranks.group) > 0:
            return news
        return _train(points, num_prototypes, settings)

    news = broadcast(validate_on_all_ranks(run, rows.ranks.group), rows.ranks.group)
    centroids, objectives = news[: -niter - 1].float().view(num_prototypes, -1), news[-niter - 1 : -1]
    return Run(centroids.to(points.device), tuple(objectives[~objectives.isnan()].tolist()), int(news[-1]))


def _train(features: Tensor, num_prototypes: int, settings: Settings) -> Tensor:
    """Centroids, objectives and re-seeded clusters as one vector. All N points are used, no noise is added to any.

    faiss's own defaults would use at most 256 points per centroid without a word, and warn on stderr below 39.
    """
    faiss, device, init, seed = load_faiss(), settings.device, settings.init, settings.seed
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA for backend='faiss', got {str(device)!r}; backend='torch' runs there")
    gpu: bool | int = False
    if device.type == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            raise RuntimeError(
                f"device={str(device)!r} asks faiss for a GPU but the installed faiss {faiss.__version__} has no GPU support: "
                "pip uninstall faiss-cpu && pip install faiss-gpu-cu12 (they install the same module), or use backend='torch'"
            )
        gpu = 1  # the number of GPUs; which one is set by the current device below
    wide = features.float()
    # Far from the origin faiss's expanded squares hold no digits of a distance; directions have no other origin.
    origin = torch.zeros(wide.shape[1], device=wide.device) if settings.spherical else wide.mean(0)
    points = np.ascontiguousarray((wide - origin).cpu().numpy())
    engine = faiss.Kmeans(
        points.shape[1],
        num_prototypes,
        niter=settings.niter,
        nredo=settings.nredo if init is None else 1,
        seed=seed if seed < 2**31 else zlib.crc32(str(seed).encode()) >> 1,  # faiss's seeds are 32 bits
        spherical=settings.spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=points.shape[0],
        verbose=False,
        gpu=gpu,
    )
    start = None if init is None else np.ascontiguousarray((init.to(origin) - origin).cpu().numpy())
    with torch.cuda.device(device) if gpu else nullcontext():
        engine.train(points, init_centroids=start)
    centroids = torch.from_numpy(np.array(engine.centroids)) + origin.cpu()
    objectives = torch.full((settings.niter,), torch.nan, dtype=torch.float64)  # as many as there were iterations: none for N = K
    objectives[: len(engine.obj)] = torch.from_numpy(np.array(engine.obj[: settings.niter]))
    if settings.spherical:  # faiss's is the sum of inner products with centroids of length 1
        objectives = float(wide.double().square().sum()) + len(points) - 2 * objectives
    reseeded = sum(step["nsplit"] for step in engine.iteration_stats)
    return torch.cat([centroids.flatten().double(), objectives, torch.tensor([reseeded])])
