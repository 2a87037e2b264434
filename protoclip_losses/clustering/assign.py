"""The final assignment, one for all engines: the nearest centroid, ties to the lowest id."""

import torch
from torch import Tensor

from ..kernels.blocks import rows_per_block


@torch.no_grad()
def assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    r"""Nearest centroid of each row in Euclidean distance.

    .. math::
        a_i = \arg\min_k \|x_i - c_k\|^2 = \arg\max_k \left( x_i \cdot c_k - \tfrac{1}{2} \|c_k\|^2 \right)

    Args:
        features: (N, D).
        centroids: (K, D).

    Returns:
        Labels (N,) int64, the lowest id among equals, and squared distances (N,).
    """
    centroids = centroids.to(device=features.device, dtype=torch.float32)
    origin = centroids.mean(0)  # distances from a point among them: far from 0, the half norms would hold no other digits
    centroids = centroids - origin
    half_norms = centroids.square().sum(1) / 2
    labels = torch.empty(features.shape[0], dtype=torch.int64, device=features.device)
    distances = torch.empty(features.shape[0], dtype=torch.float32, device=features.device)
    step = rows_per_block(centroids.shape[0], torch.float32, None)
    for start in range(0, features.shape[0], step):
        rows = slice(start, start + step)
        block = features[rows].float() - origin
        labels[rows] = torch.addmm(half_norms, block, centroids.T, beta=-1).argmax(1)
        # From the difference itself: expanding the square loses all digits of a small distance.
        distances[rows] = (block - centroids[labels[rows]]).square().sum(1)
    return labels, distances
