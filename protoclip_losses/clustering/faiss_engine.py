"""K-means by faiss, on the CPU or, with a GPU build of faiss, on one GPU."""

import zlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import broadcast, rank, validate_on_all_ranks
from .origin import robust_origin, spaced
from .points import EngineResult, KMeansConfig, ShardedPoints


def load_faiss() -> Any:
    """The faiss module, or an error that says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("K-means with backend='faiss' needs faiss: pip install faiss-cpu") from error
    return faiss


def kmeans(points: ShardedPoints, num_clusters: int, config: KMeansConfig) -> EngineResult:
    """K-means of the points of all ranks on the group's first rank; the others receive its centroids, or its error."""
    everything, group, niter = points.in_order(), points.ranks.group, config.niter
    centroid_values = num_clusters * everything.shape[1]

    def train() -> Tensor:
        if rank(group) > 0:
            return torch.zeros(centroid_values + niter + 1, dtype=torch.float64)
        return _train(everything, num_clusters, config)

    message = broadcast(validate_on_all_ranks(train, group), group)
    centroids, objectives, reseeded = torch.split(message, [centroid_values, niter, 1])
    centroids = centroids.float().view(num_clusters, -1).to(everything.device)
    return EngineResult(centroids, tuple(objectives[~objectives.isnan()].tolist()), int(reseeded))


def _train(points: Tensor, num_clusters: int, config: KMeansConfig) -> Tensor:
    """Centroids, objectives and the number of reseeded clusters as one vector. All N points are used as they are.

    faiss by default takes at most 256 points per centroid, without a warning, and warns on stderr below 39.
    """
    faiss, device, init, seed = load_faiss(), config.device, config.init, config.seed
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
    x = points.float()
    # Far from the origin faiss's expanded squares have no digits left for a distance; directions have no other origin.
    origin = torch.zeros(x.shape[1], device=x.device)
    if not config.spherical:
        origin = robust_origin(x.mean(0), x[spaced(len(x), x.device)])
    array = np.ascontiguousarray((x - origin).cpu().numpy())
    engine = faiss.Kmeans(
        array.shape[1],
        num_clusters,
        niter=config.niter,
        nredo=config.nredo if init is None else 1,
        seed=seed if seed < 2**31 else zlib.crc32(str(seed).encode()) >> 1,  # faiss's seeds have 32 bits
        spherical=config.spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=array.shape[0],
        verbose=False,
        gpu=gpu,
    )
    init_centroids = None if init is None else np.ascontiguousarray((init.to(origin) - origin).cpu().numpy())
    with torch.cuda.device(device) if gpu else nullcontext():
        engine.train(array, init_centroids=init_centroids)
    centroids = torch.from_numpy(np.array(engine.centroids)) + origin.cpu()
    objectives = torch.full((config.niter,), torch.nan, dtype=torch.float64)  # NaN after the last iteration: none for N = K
    objectives[: len(engine.obj)] = torch.from_numpy(np.array(engine.obj[: config.niter]))
    if config.spherical:  # faiss's objective is the sum of inner products with centroids of length 1
        objectives = float(x.double().square().sum()) + len(array) - 2 * objectives
    reseeded = sum(step["nsplit"] for step in engine.iteration_stats)
    return torch.cat([centroids.flatten().double(), objectives, torch.tensor([reseeded])])
