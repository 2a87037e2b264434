"""Sample clusters with their pictures and captions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ._style import INK, PathLike, new_figure, save

# In inches: a cell is a square picture with two lines of caption below it; the title is above, the row titles at left.
SIDE, CAPTION, GAP, TITLE, MARGIN = 1.1, 0.42, 0.18, 0.55, 1.1
HEADING, HEADING_WIDTH = "Sample clusters, from the largest to the smallest", 4.8


def cluster_grid(
    pictures: Any, labels: Tensor, captions: Sequence[str], path: PathLike, *, num_clusters: int = 8, per_cluster: int = 7
) -> Path:
    """Draw sample clusters, one a row, each with some of its pictures and their captions.

    The clusters are spread evenly over the sizes that occur, from the largest on; one with a single member is passed over where
    there are others. Nothing is random, so that two runs can be compared row by row.

    **Use it when:** you want to see what the prototypes group: the labels are those of a clustering of any features.
    **Not when:** clusters are to be judged by a number: :func:`~protoclip_losses.metrics.grouping`.
    **Related:** :class:`~protoclip_losses.EpisodicClusterer` makes the labels.

    Args:
        pictures: (N, 3, H, W) uint8; or anything that returns such rows for an int64 tensor of row numbers.
        labels: (N,), any integer dtype: the cluster of each row; negative means in none.
        captions: N strings.
        path: of the PNG.
        num_clusters: rows to draw at most.
        per_cluster: pictures in a row at most.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: labels that are not integers, captions that are not strings, numbers that are not ints.
        ValueError: lengths that differ, a number below 1, or no row in any cluster.

    Example:
        >>> import tempfile
        >>> import torch
        >>> folder, pictures = tempfile.mkdtemp(), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        >>> cluster_grid(pictures, torch.tensor([0, 0, 1]), ["a", "b", "c"], f"{folder}/grid.png").name
        'grid.png'
    """
    captions = check.strings("captions", captions)
    check.integers("labels", labels, length=len(captions), of=" as captions", any_dtype=True)
    if isinstance(pictures, Tensor) and (pictures.ndim != 4 or pictures.shape[:2] != (len(labels), 3)):
        raise ValueError(f"pictures must have shape ({len(labels)}, 3, H, W) as labels, got shape {check.shape(pictures)}")
    check.positive_int("num_clusters", num_clusters)
    check.positive_int("per_cluster", per_cluster)
    labels = labels.cpu()
    if not bool((labels >= 0).any()):
        raise ValueError("labels must be 0 or more for at least one row, got no row that is in a cluster")
    chosen = _spread_over_sizes(labels, num_clusters)
    columns = min(per_cluster, int((labels == chosen[0]).sum()))
    taken = MARGIN + columns * (SIDE + GAP)
    width, height = max(taken, HEADING_WIDTH), TITLE + len(chosen) * (SIDE + CAPTION)
    figure = new_figure(width, height, constrained=False)
    spacing = {
        "left": MARGIN / width,
        "right": (taken - GAP) / width,
        "top": 1 - TITLE / height,
        "bottom": CAPTION / height,
        "hspace": CAPTION / SIDE,
        "wspace": GAP / SIDE,
    }
    grid = figure.subplots(len(chosen), columns, squeeze=False, gridspec_kw=spacing)
    for cluster, row in zip(chosen, grid, strict=True):
        members = (labels == cluster).nonzero()[:, 0]
        _draw_row(row, f"cluster {cluster}\n{len(members)} member{'s' * (len(members) > 1)}", members, pictures, captions)
    figure.text(0.15 / width, 1 - 0.5 * TITLE / height, HEADING, fontsize=13, color=INK, va="center")
    return save(figure, path)


def _spread_over_sizes(labels: Tensor, num_clusters: int) -> list[int]:
    """The clusters to draw, largest first."""
    sizes = torch.bincount(labels[labels >= 0])
    by_size = [int(k) for k in sizes.argsort(descending=True, stable=True) if sizes[k] > 1] or [int(sizes.argmax())]
    step = max(1.0, len(by_size) / num_clusters)
    return [by_size[int(row * step)] for row in range(min(num_clusters, len(by_size)))]


def _draw_row(row: Sequence[Any], title: str, members: Tensor, pictures: Any, captions: Sequence[str]) -> None:
    """Draw one cluster: its title, and members evenly spread over its rows."""
    count = min(len(row), len(members))
    members = members[torch.linspace(0, len(members) - 1, count, dtype=torch.float32, device="cpu").round().long()]
    for panel in row:
        panel.set_axis_off()
    for panel, number, picture in zip(row, members.tolist(), pictures[members], strict=False):
        panel.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="bilinear")
        lines = textwrap.wrap(captions[number], 21, max_lines=2, placeholder=" ...") or [""]
        place = {"transform": panel.transAxes, "ha": "center", "va": "top"}
        # A caption may hold dollar signs.
        panel.text(0.5, -0.05, "\n".join(lines), fontsize=7, color=INK, parse_math=False, **place)
    row[0].text(-0.14, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=8.5, color=INK)
