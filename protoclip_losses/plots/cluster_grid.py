"""Pictures of a run: loss curves, a map of both modalities, sample clusters.

Each function draws on a figure of its own, without pyplot's global state and without a display, writes a PNG and returns
its path. matplotlib is imported when one is called: ``pip install 'protoclip-losses[plots]'``.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cluster_grid", "loss_curves", "modality_map"]

PathLike = str | os.PathLike[str]

# Twelve colours that stay apart on white, also for most colour-blind readers when next to each other.
_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#7b3fb5", "#6b8e23", "#b0124f", "#17becf",
    "#7f7f7f",
)  # fmt: skip
_INK, _FAINT = "#333333", "#dddddd"


def loss_curves(records: Sequence[Mapping[str, float]], path: PathLike) -> Path:
    r"""Draw every logged loss over the training steps: the total dashed, each term faint under its running mean.

    The running mean of value :math:`v_t` over a window w of a twentieth of the records is
    :math:`\tfrac1w \sum_{u=t-w+1}^{t} v_u`, over the values there are; it starts anew where a
    term was switched off (logged as an exact zero), which is a gap in its line.

    Args:
        records: one mapping per logged step, with ``"step"`` and any of ``"loss"``, ``"contrastive_loss"``,
            ``"proto_loss"``, ``"proto_external_loss"``; a term whose values are all zero is left out. ``"logit_scale"``
            and ``"logit_scale_proto"`` go to a second panel.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no record, a record without ``"step"``, or none of the names above.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> loss_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], f"{folder}/loss.png").name
        'loss.png'
    """
    if len(records) == 0 or any("step" not in record for record in records):
        raise ValueError(f"records: got {len(records)}, wanted at least one, and a 'step' in each")
    titles = {
        "loss": "total",
        "contrastive_loss": "InfoNCE",
        "proto_loss": "prototypes, image and text",
        "proto_external_loss": "prototypes, external teachers",
    }
    scale_titles = {"logit_scale": "InfoNCE", "logit_scale_proto": "prototypes"}
    drawn = {name: title for name, title in titles.items() if any(record.get(name) for record in records)}
    scales = {name: title for name, title in scale_titles.items() if any(name in record for record in records)}
    if not drawn:
        raise ValueError(f"records: got none of {', '.join(titles)}, wanted at least one of them")
    figure = _figure(9.0, 6.2 if scales else 4.2)
    heights = [3, 1.2] if scales else [1]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, lines, label in zip(panels, (drawn, scales), ("loss", "logit scale"), strict=False):
        for colour, (name, title) in zip(("#333333", *_COLOURS) if lines is drawn else _COLOURS, lines.items(), strict=False):
            steps = [record["step"] for record in records if name in record]
            # A term that is switched off (warm-up, LiT) is logged as an exact zero: a gap in its line, not a fall to zero.
            values = [float(record[name]) or math.nan for record in records if name in record]
            if name == "loss":
                # The sum jumps wherever a term is switched on or off: a running mean would draw a slope there.
                panel.plot(steps, values, color="#888888", linewidth=1.0, linestyle=(0, (4, 2)), label=title)
                continue
            if lines is drawn:
                panel.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
                values = _running_mean(values, max(1, len(values) // 20))
            panel.plot(steps, values, color=colour, linewidth=1.9, label=title)
        panel.set_ylabel(label, color=_INK)
        panel.grid(color=_FAINT, linewidth=0.6)
        panel.legend(frameon=False, fontsize=9, ncols=2 if lines is scales else 1)
        panel.margins(x=0.01)
        _bare(panel)
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel("training step", color=_INK)
    panels[0].set_title("Training losses", loc="left", fontsize=13, color=_INK)
    return _save(figure, path)


def modality_map(image: Tensor, text: Tensor, categories: Tensor | None, names: Sequence[str] | None, path: PathLike) -> Path:
    r"""Draw both modalities on one plane, coloured by category; images are dots and texts are crosses.

    The plane is that of the two leading principal axes of all L2-normalised features together,
    :math:`p_i = (z_i / \lVert z_i \rVert_2 - \mu) V_2`, so the distance between the two clouds on it is the visible
    part of the modality gap.

    Args:
        image: image features, shape (N, d), any floating dtype.
        text: text features, shape (N, d); row i belongs to image i.
        categories: class of each pair, integers of shape (N,) in [0, len(names)); None colours by modality.
        names: a name per class; None if `categories` is.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: shapes that do not fit each other, fewer than 2 pairs, or categories outside the names.

    Example:
        >>> import tempfile
        >>> folder, z = tempfile.mkdtemp(), torch.eye(4)
        >>> modality_map(z, z.flip(0), torch.tensor([0, 0, 1, 1]), ["cats", "dogs"], f"{folder}/map.png").name
        'map.png'
    """
    if image.ndim != 2 or image.shape != text.shape or len(image) < 2 or image.shape[1] < 2:
        raise ValueError(
            f"image, text: got shapes {tuple(image.shape)} and {tuple(text.shape)}, wanted (N, d) twice with N and d at least 2"
        )
    if (categories is None) != (names is None):
        raise ValueError("categories, names: got one without the other, wanted both or neither")
    if categories is not None and names is not None:
        if categories.shape != (len(image),):
            raise ValueError(f"categories: got shape {tuple(categories.shape)}, wanted ({len(image)},)")
        if int(categories.min()) < 0 or int(categories.max()) >= len(names):
            raise ValueError(f"categories: got values outside [0, {len(names)}), which is what names has")
    both = F.normalize(torch.cat([image, text]).detach().double().cpu(), dim=1)
    centred = both - both.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes[:2].T
    shares = plane.var(0) / centred.var(0).sum().clamp(min=1e-30)
    figure = _figure(10.0, 6.6)
    panel = figure.subplots()
    clouds = ((plane[: len(image)], "o", 16), (plane[len(image) :], "x", 20))
    handles, labels = [], []
    means = torch.stack([points.mean(0) for points, _, _ in clouds])
    panel.plot(*means.T.numpy(), color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=4)
    panel.scatter(*means.T.numpy(), c="white", edgecolors=_INK, marker="D", s=44, zorder=5)
    for number, (points, marker, size) in enumerate(clouds):
        edge = {"linewidths": 0.0} if marker == "o" else {"linewidths": 1.0}
        if categories is None:
            colours: Any = _COLOURS[number]
        else:
            colours = [_colour(int(category)) for category in categories]
        panel.scatter(*points.T.numpy(), c=colours, marker=marker, s=size, alpha=0.6, **edge)
        colour = _COLOURS[number] if categories is None else _INK
        handles.append(panel.scatter([], [], c=colour, marker=marker, s=42, **edge))
        labels.append(("images", "texts")[number])
    for category, name in enumerate(names or ()):
        if categories is not None and bool((categories == category).any()):
            handles.append(panel.scatter([], [], c=_colour(category), marker="s", s=52, linewidths=0))
            labels.append(textwrap.shorten(name, 28, placeholder="..."))
    panel.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10, labelspacing=0.7)
    panel.set_title("Images and texts on their two leading principal axes", loc="left", fontsize=13, color=_INK)
    panel.set_xlabel(f"first axis ({float(shares[0]):.0%} of the variance)", color=_INK)
    panel.set_ylabel(f"second axis ({float(shares[1]):.0%})", color=_INK)
    panel.grid(color=_FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_aspect("equal", adjustable="datalim")
    _bare(panel)
    return _save(figure, path)


def cluster_grid(
    pictures: Any, labels: Tensor, captions: Sequence[str], path: PathLike, *, num_clusters: int = 8, per_cluster: int = 7
) -> Path:
    """Draw sample clusters, one a row, each with some of its pictures and their captions.

    The clusters are spread evenly over the sizes that occur, from the largest on; one with a single member is passed
    over where there are others. Nothing is random, so two runs can be laid side by side.

    Args:
        pictures: uint8, shape (N, 3, H, W); or anything that gives such rows for an int64 tensor of row numbers.
        labels: cluster of each row, integers of shape (N,); negative means in none.
        captions: N strings.
        path: of the PNG.
        num_clusters: rows to draw at most.
        per_cluster: pictures in a row at most.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: lengths that differ, a number below 1, or no row in any cluster.

    Example:
        >>> import tempfile
        >>> folder, pictures = tempfile.mkdtemp(), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        >>> cluster_grid(pictures, torch.tensor([0, 0, 1]), ["a", "b", "c"], f"{folder}/grid.png").name
        'grid.png'
    """
    if labels.ndim != 1 or len(captions) != len(labels):
        raise ValueError(f"labels: got shape {tuple(labels.shape)} for {len(captions)} captions, wanted ({len(captions)},)")
    if isinstance(pictures, Tensor) and (pictures.ndim != 4 or pictures.shape[:2] != (len(labels), 3)):
        raise ValueError(f"pictures: got shape {tuple(pictures.shape)}, wanted ({len(labels)}, 3, H, W)")
    if num_clusters < 1 or per_cluster < 1:
        raise ValueError(f"num_clusters, per_cluster: got {num_clusters} and {per_cluster}, wanted at least 1")
    labels = labels.cpu()
    sizes = torch.bincount(labels[labels >= 0]) if bool((labels >= 0).any()) else torch.zeros(0, dtype=torch.int64)
    if len(sizes) == 0:
        raise ValueError("labels: got no row that is in a cluster, wanted at least one label of 0 or more")
    by_size = [int(k) for k in sizes.argsort(descending=True, stable=True) if sizes[k] > 1] or [int(sizes.argmax())]
    step = max(1.0, len(by_size) / num_clusters)
    chosen = [by_size[int(row * step)] for row in range(min(num_clusters, len(by_size)))]
    # In inches: a cell is a square picture with two lines of caption below it; the title is above, the row titles at left.
    side, caption, gap, title, margin = 1.1, 0.42, 0.18, 0.55, 1.1
    width, height = margin + per_cluster * (side + gap), title + len(chosen) * (side + caption)
    figure = _figure(width, height, constrained=False)
    grid = figure.subplots(
        len(chosen),
        per_cluster,
        squeeze=False,
        gridspec_kw={
            "left": margin / width,
            "right": 1 - gap / width,
            "top": 1 - title / height,
            "bottom": caption / height,
            "hspace": caption / side,
            "wspace": gap / side,
        },
    )
    for cluster, row in zip(chosen, grid, strict=True):
        members = (labels == cluster).nonzero()[:, 0]
        members = members[torch.linspace(0, len(members) - 1, min(per_cluster, len(members))).round().long()]
        shown = pictures[members]
        for panel in row:
            panel.set_axis_off()
        for panel, number, picture in zip(row, members.tolist(), shown, strict=False):
            panel.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="bilinear")
            lines = textwrap.wrap(captions[number], 21, max_lines=2, placeholder=" ...") or [""]
            panel.text(0.5, -0.05, "\n".join(lines), transform=panel.transAxes, ha="center", va="top", fontsize=7, color=_INK)
        row[0].text(
            -0.14,
            0.5,
            f"cluster {cluster}\n{int(sizes[cluster])} members",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    heading = "Sample clusters, from the largest to the smallest"
    figure.text(0.15 / width, 1 - 0.5 * title / height, heading, fontsize=13, color=_INK, va="center")
    return _save(figure, path)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values, starting anew after a gap."""
    means: list[float] = []
    run: list[float] = []
    for value in values:
        run = [] if math.isnan(value) else [*run, value][-window:]
        means.append(sum(run) / len(run) if run else math.nan)
    return means


def _colour(category: int) -> str:
    return _COLOURS[category % len(_COLOURS)]


def _figure(width: float, height: float, *, constrained: bool = True) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install 'protoclip-losses[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained" if constrained else None)


def _bare(panel: Any) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#999999")
    panel.tick_params(colors=_INK, labelsize=9)


def _save(figure: Any, path: PathLike) -> Path:
    target = Path(path)
    figure.savefig(target, dpi=140, facecolor="white")
    return target
