"""K-means by faiss, on the CPU or, with a GPU build of faiss, on one GPU."""

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import broadcast, rank, validate_on_all_ranks
from .assign import directions
from .origin import LARGEST_LENGTH, SMALLEST_LENGTH, robust_origin, sampled_positions
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
            return torch.zeros(centroid_values + niter + 1, dtype=torch.float64, device="cpu")
        return _train(everything, num_clusters, config)

    message = broadcast(validate_on_all_ranks(train, group), group)
    centroids, objectives, reseeded = torch.split(message, [centroid_values, niter, 1])
    centroids = centroids.float().view(num_clusters, -1).to(everything.device)
    return EngineResult(centroids, tuple(objectives[~objectives.isnan()].tolist()), int(reseeded))


def _train(points: Tensor, num_clusters: int, config: KMeansConfig) -> Tensor:
    """Centroids, objectives and the number of reseeded clusters as one vector. All N points are used as they are.

    faiss by default takes at most 256 points per centroid, without a warning, and warns on stderr below 39.
    """
    faiss, init, seed = load_faiss(), config.init, config.seed
    gpu = _gpu(faiss, config.device)
    x = points.float().cpu()
    origin, spread = robust_origin(x.mean(0), x[sampled_positions(len(x))])
    if config.spherical:  # directions have no other origin
        origin, spread = torch.zeros_like(origin), x.new_zeros(())
    x = x - origin
    factor = _factor(x, float(spread))
    array = np.ascontiguousarray((x if factor == 1 else x * factor).numpy())
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
        gpu=False,
    )
    if gpu is not None:  # with gpu=1 faiss takes all GPUs, with a larger number that many
        engine.index = faiss.index_cpu_to_gpus_list(engine.index, gpus=[gpu])
    init_centroids = None if init is None else np.ascontiguousarray(((init.to(origin) - origin) * factor).numpy())
    engine.train(array, init_centroids=init_centroids)
    centroids = torch.from_numpy(np.array(engine.centroids))
    objectives = torch.full((config.niter,), torch.nan, dtype=torch.float64, device="cpu")  # NaN after the last iteration
    objectives[: len(engine.obj)] = torch.from_numpy(np.array(engine.obj[: config.niter]))  # which for N = K is none
    if config.spherical:  # faiss's objective is the sum of inner products with centroids of length 1
        squared_norms = torch.linalg.vector_norm(x, dtype=torch.float64) ** 2
        centroids, objectives = directions(centroids, torch.float32), squared_norms + len(x) - 2 * objectives / factor
    else:
        centroids, objectives = centroids / factor + origin, objectives / factor**2
    reseeded = sum(step["nsplit"] for step in engine.iteration_stats)
    return torch.cat([centroids.flatten().double(), objectives, objectives.new_tensor([reseeded])])


def _gpu(faiss: Any, device: torch.device) -> int | None:
    """The number of the GPU that ``device`` names, None for the CPU."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA for backend='faiss', got {str(device)!r}; backend='torch' runs there")
    if device.type == "cpu":
        return None
    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError(
            f"device={str(device)!r} asks faiss for a GPU but the installed faiss {faiss.__version__} has no GPU support: "
            "pip uninstall faiss-cpu && pip install faiss-gpu-cu12 (they install the same module), or use backend='torch'"
        )
    count = faiss.get_num_gpus()
    if count == 0:
        raise RuntimeError(
            f"device={str(device)!r} asks faiss for a GPU but faiss {faiss.__version__}, which has GPU support, sees none: see "
            "what nvidia-smi lists and whether CUDA_VISIBLE_DEVICES hides it, or use device='cpu'"
        )
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= count:
        raise RuntimeError(f"device must be one of the {count} GPUs that faiss sees, got {str(device)!r}")
    return number


def _factor(x: Tensor, spread: float) -> float:
    """The power of two that points (N, D) are multiplied by, so that faiss can square them: 1 if it can."""
    largest = max(abs(float(value)) for value in x.aminmax())
    limit = LARGEST_LENGTH / x.shape[1] ** 0.5
    typical = spread or largest
    if largest < limit and (typical > SMALLEST_LENGTH or largest == 0):
        return 1.0
    wanted = -math.frexp(typical)[1] if typical < SMALLEST_LENGTH else 0
    return 2.0 ** max(-126, min(wanted, 126, math.frexp(limit / largest)[1] - 1))
