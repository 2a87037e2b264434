"""Principal components of a teacher's features, fitted once and frozen."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import full_precision, plain_arithmetic
from ..distributed import Group, rank, validate_on_all_ranks
from .fitted import fit_once, load_fitted
from .rows import TeacherRows


class PCA:
    r"""Projection onto the ``dim`` directions of largest variance.

    .. math::
        y = (x - \mu) W, \qquad W = \text{top eigenvectors of } \mathrm{Cov}(x)

    **Use it when:** a teacher is wide: the paper clusters RoBERTa's features in 64 dimensions.
    **Not when:** the teacher is narrow already, and its own width loses nothing.
    **Related:** :class:`~protoclip_losses.TeacherAdapter` fits one where ``dim`` is given, and saves it.

    Args:
        mean: (D_E,) float32.
        components: (D_E, dim) float32, columns of unit length, largest variance first.

    Raises:
        ValueError: a mean and components that do not fit each other.

    Example:
        >>> from protoclip_losses.teachers import PCA
        >>> x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
        >>> pca = PCA.fit([x], dim=2)
        >>> pca, pca(x).shape
        (PCA(6 -> 2), torch.Size([100, 2]))

    Source:
        ProtoCLIP section IV-A, https://arxiv.org/abs/2206.10996.
    """

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        check.matrix("components", components)
        if mean.shape != components.shape[:1]:
            raise ValueError(f"mean must have shape ({len(components)},) as components has rows, got {check.shape(mean)}")
        self.mean, self.components = mean, components

    def __repr__(self) -> str:
        return f"PCA({self.components.shape[0]} -> {self.components.shape[1]})"

    @classmethod
    @plain_arithmetic()
    def fit(cls, blocks: Iterable[Tensor], dim: int) -> "PCA":
        """Fit on blocks of rows (n, D_E), read once, sums in float64. Each direction's largest entry is made positive.

        Raises:
            ValueError: no rows, or ``dim`` larger than their width.
        """
        count = 0
        for block in blocks:
            # Moments in float64 and eigenvectors: MPS has neither.
            rows = (block.cpu() if block.device.type == "mps" else block).double()
            if count == 0:
                device, origin = block.device, rows.mean(0)  # moments about it: no cancellation for features far from 0
                total, second = origin.new_zeros(len(origin)), origin.new_zeros(len(origin), len(origin))
            rows = rows - origin
            count, total, second = count + len(rows), total + rows.sum(0), second + rows.T @ rows
        if count == 0:
            raise ValueError("blocks must hold at least one row, got none")
        if dim > len(origin):
            raise ValueError(f"dim must be at most the width {len(origin)} of the rows, got {dim}")
        shift = total / count
        covariance = second / count - torch.outer(shift, shift)
        _, vectors = torch.linalg.eigh(covariance)
        components = vectors.flip(1)[:, :dim]
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        mean, components = (origin + shift).float(), (components * largest.sign()).float().contiguous()
        return cls(mean.to(device), components.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (n, D_E) to (n, dim), float32."""
        with torch.autocast(x.device.type, enabled=False), full_precision():
            return (x.float() - self.mean) @ self.components

    def state_dict(self) -> dict[str, Tensor]:
        """Mean and components, as the constructor takes them."""
        return {"mean": self.mean, "components": self.components}


def pca_from_state(owner: str, state: Mapping[str, Any], width: int, device: torch.device) -> PCA:
    """The PCA in a saved state, checked: one of rows of this width."""
    check.state_has(owner, state, ("mean", "components"))
    mean, components = state["mean"], state["components"]
    if len(mean) != width:
        raise ValueError(f"state_dict is of width {len(mean)}, this teacher's rows of {width}")
    check.matrix("state_dict['components']", components, rows=width, width=state.get("dim"), of=" as mean and dim say")
    check.finite("state_dict['components']", components)
    return PCA(mean.to(device, copy=True), components.to(device, copy=True))


def fit_pca(rows: TeacherRows, dim: int) -> PCA:
    """A PCA of all rows."""
    check.positive_int("dim", dim)
    if dim > min(len(rows), rows.width):
        shape = (len(rows), rows.width)
        raise ValueError(f"dim must be at most the teacher's width and number of rows, {shape}, got {dim}")
    return PCA.fit(rows.blocks(), dim)


def fit_pca_once(
    fit: Callable[[], PCA], cache: Path, files: Sequence[Path], fitted_on: Mapping[str, Any], group: Group | None
) -> PCA:
    """The PCA that is kept with a cache: the first rank fits it where there is none, and all read it."""

    def fit_on_first_rank() -> None:
        if rank(group) == 0:
            fit_once(lambda: fit().state_dict(), cache, files, fitted_on)

    validate_on_all_ranks(fit_on_first_rank, group)
    return validate_on_all_ranks(lambda: PCA(**load_fitted(files, fitted_on)), group)
