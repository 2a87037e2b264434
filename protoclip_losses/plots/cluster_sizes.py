"""How many rows each cluster has."""

from pathlib import Path

import torch
from torch import Tensor

from .. import _checks as check
from ._style import COLOURS, GREY, INK, PathLike, count_axis, new_figure, plain_axes, save

BINS = 40


def cluster_sizes(counts: Tensor, path: PathLike) -> Path:
    r"""Draw how many clusters have how many rows: bars over sizes on a logarithmic scale, the mean size dashed.

    Bars count clusters with sizes in :math:`[b_i, b_{i+1})`, of which the edges :math:`b_i` are at equal distances of their
    logarithms; empty clusters are in the title.

    **Use it when:** a clustering is new: a few huge clusters, or many of one row, are seen at once.
    **Not when:** one number is enough: ``report.imbalance``.
    **Related:** :func:`cluster_grid` shows what is in clusters; :class:`~protoclip_losses.KMeansResult` has the counts.

    Args:
        counts: (K,), rows of each cluster.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no cluster that has a row.

    Example:
        >>> import tempfile, torch
        >>> cluster_sizes(torch.tensor([3, 1, 8]), f"{tempfile.mkdtemp()}/sizes.png").name
        'sizes.png'
    """
    check.integers("counts", counts, any_dtype=True)
    sizes = counts[counts > 0].cpu().double()
    if len(sizes) == 0:
        raise ValueError(f"counts must have a cluster with a row, got {len(counts)} empty ones")
    figure = new_figure(7.0, 4.0)
    panel = figure.subplots()
    edges = torch.logspace(0, float((sizes.max() + 1).log10()), BINS + 1, dtype=torch.float64)
    bounds = sorted({*edges.floor().tolist(), float(sizes.max()) + 1})  # whole numbers
    heights = torch.bincount(torch.bucketize(sizes, edges.new_tensor(bounds), right=True) - 1, minlength=len(bounds) - 1)
    panel.stairs(heights.tolist(), bounds, fill=True, color=COLOURS[0])
    mean = float(sizes.sum()) / len(counts)
    panel.axvline(mean, color=GREY, linestyle=(0, (4, 2)), label=f"mean {mean:.3g}")
    panel.set_xscale("log")
    count_axis(panel.xaxis)
    panel.set_xlabel("rows of a cluster", color=INK)
    panel.set_ylabel("clusters", color=INK)
    panel.set_title(f"{len(counts):,} clusters, {len(counts) - len(sizes):,} empty", loc="left", fontsize=13, color=INK)
    panel.legend(frameon=False, fontsize=9)
    plain_axes(panel)
    return save(figure, path)
