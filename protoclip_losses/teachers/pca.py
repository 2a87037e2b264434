"""Principal components of a teacher's features, fitted once and frozen."""

from collections.abc import Iterable

import torch
from torch import Tensor


class PCA:
    r"""Projection onto the ``dim`` directions of largest variance.

    .. math::
        y = (x - \mu) W, \qquad W = \text{top eigenvectors of } \mathrm{Cov}(x)

    Args:
        mean: (D_E,) float32.
        components: (D_E, dim) float32, columns of unit length, largest variance first.
    """

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        self.mean, self.components = mean, components

    @classmethod
    def fit(cls, blocks: Iterable[Tensor], dim: int) -> "PCA":
        """Fit on blocks of rows (n, D_E), read once, sums in float64. Each direction's largest entry is made positive."""
        count, total, second = 0, torch.zeros(()), torch.zeros(())
        for block in blocks:
            wide = block.double()
            if count == 0:
                origin = wide.mean(0)  # moments about a point near the mean: no cancellation for features far from 0
            wide = wide - origin
            count, total, second = count + len(wide), total + wide.sum(0), second + wide.T @ wide
        shift = total / count
        covariance = second / count - torch.outer(shift, shift)
        _, vectors = torch.linalg.eigh(covariance)
        components = vectors.flip(1)[:, :dim]
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        return cls((origin + shift).float(), (components * largest.sign()).float().contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (n, D_E) to (n, dim), float32."""
        return (x.float() - self.mean) @ self.components
