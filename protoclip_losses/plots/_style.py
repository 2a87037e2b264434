"""Colours, axes and files that all pictures share."""

import os
from pathlib import Path
from typing import Any

from .. import _checks as check

PathLike = str | os.PathLike[str]

# Twelve colours that stay apart on white, also for most colour-blind readers when next to each other.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#7b3fb5", "#6b8e23", "#b0124f", "#17becf",
    "#7f7f7f",
)  # fmt: skip
INK, GREY, FAINT = "#333333", "#888888", "#dddddd"


def new_figure(width: float, height: float, *, constrained: bool = True) -> Any:
    """A figure of this size in inches, unknown to pyplot."""
    figure = check.require("matplotlib.figure", "plots").Figure
    return figure(figsize=(width, height), layout="constrained" if constrained else None)


def plain_axes(panel: Any) -> None:
    """Axes with a faint grid below the data and no frame at the top and at the right."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#999999")
    panel.tick_params(colors=INK, labelsize=9)
    panel.grid(color=FAINT, linewidth=0.6)
    panel.set_axisbelow(True)


def count_axis(axis: Any) -> None:
    """Write the counts of a logarithmic axis out: 60, and not 6 x 10^1."""
    formatter = check.require("matplotlib.ticker", "plots").LogFormatter
    axis.set_major_formatter(formatter())
    axis.set_minor_formatter(formatter(minor_thresholds=(2, 0.4)))


def save(figure: Any, path: PathLike) -> Path:
    """Write the PNG and return its path."""
    target = Path(path)
    figure.savefig(target, dpi=140, facecolor="white")
    return target
