"""The clusters of an episode."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._style import COLOURS, INK, PathLike, count_axis, new_figure, plain_axes, save

if TYPE_CHECKING:
    from ..prototypes import EpisodeReport

MARKERS = "osD^vP"  # colour is not all that tells lines apart


def episode_report(report: "EpisodeReport", path: PathLike) -> Path:
    r"""Draw an episode's clusters: their sizes, how far clusterings agree, and how they change from episode to episode.

    The sizes are sorted, from the largest cluster to the smallest, on a logarithmic axis that leaves empty ones out; a dotted
    line is the mean, N/K. Agreement is the adjusted mutual information of each two clusterings, over the episodes so far. The
    last panel has drift, the mean distance from the centroids to the nearest of the episode before, and dashed the share of
    samples that changed their cluster. A panel without anything to show is left out.

    **Use it when:** you want to see how prototypes develop: clusters that grow to a large share of the samples, clusterings that
    come to agree, or centroids that still move.
    **Not when:** you want to see what is in the clusters: :func:`cluster_grid`.
    **Related:** :meth:`EpisodeReport.plot <protoclip_losses.EpisodeReport.plot>` calls it; its
    :meth:`~protoclip_losses.EpisodeReport.scalars` are the same numbers for any logger.

    Args:
        report: ``prototypes.report`` of what :meth:`EpisodicClusterer.build <protoclip_losses.EpisodicClusterer.build>` returns.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a report of no clusters, such as that of prototypes from a checkpoint.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from protoclip_losses import EpisodicClusterer, FeatureBank
        >>> h = torch.nn.functional.normalize(torch.arange(12.0).reshape(6, 2).sin(), dim=1)
        >>> bank = FeatureBank.from_features(torch.arange(6), image=h, text=h)
        >>> report = EpisodicClusterer(num_prototypes=2).build(bank).report
        >>> episode_report(report, f"{tempfile.mkdtemp()}/episode.png").name
        'episode.png'
    """
    if not report.sizes:
        raise ValueError("report must have the sizes of clusters, got none: it is that of prototypes that were not built here")
    history = report.history
    agreement = _lines(history, "/ami")
    changes = {name: _lines(history, f"/{name}") for name in ("drift", "changed")}
    draw: list[Callable[[Any], None]] = [lambda panel: _draw_sizes(panel, report.sizes)]
    if agreement:
        draw.append(lambda panel: _draw_agreement(panel, agreement))
    if any(changes.values()):
        draw.append(lambda panel: _draw_changes(panel, changes))
    figure = new_figure(6.0, 0.5 + 2.4 * len(draw))
    for panel, content in zip(figure.subplots(len(draw), 1, squeeze=False)[:, 0], draw, strict=True):
        plain_axes(panel)
        content(panel)
    figure.suptitle(f"Clusters of episode {len(history)}" if history else "Clusters", x=0.02, ha="left", fontsize=13, color=INK)
    return save(figure, path)


def _lines(history: Sequence[Mapping[str, float]], ending: str) -> dict[str, list[float]]:
    """Values over the episodes of the numbers with this ending, by what is before it; NaN for an episode without."""
    names = dict.fromkeys(name for values in history for name in values if name.endswith(ending))
    return {name.removesuffix(ending): [values.get(name, math.nan) for values in history] for name in names}


def _draw_sizes(panel: Any, sizes: Mapping[str, Sequence[int]]) -> None:
    for number, (teacher, own) in enumerate(sizes.items()):
        ranked = sorted((size for size in own if size), reverse=True)
        empty = len(own) - len(ranked)
        every = max(1, len(ranked) // 8)
        _draw_line(
            panel, number, ranked, f"{teacher}, {empty:,} empty" if empty else teacher, markevery=(number * every // 3, every)
        )
        panel.axhline(sum(own) / len(own), color=COLOURS[number % len(COLOURS)], linewidth=1.0, linestyle=":")
    panel.set_yscale("log")
    count_axis(panel.yaxis)
    panel.set_ylabel("samples", color=INK)
    panel.set_xlabel("cluster, from the largest on", color=INK)
    panel.legend(frameon=False, fontsize=9)


def _draw_agreement(panel: Any, lines: Mapping[str, Sequence[float]]) -> None:
    for number, (pair, values) in enumerate(lines.items()):
        _draw_line(panel, number, values, pair.replace("-", " and "))
    panel.set_ylabel("agreement (AMI)", color=INK)
    lowest = min(0.0, *(v for values in lines.values() for v in values if not math.isnan(v)))
    _over_episodes(panel, bottom=lowest, top=1.03)  # two equal clusterings have 1


def _draw_changes(panel: Any, changes: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    for number, (teacher, values) in enumerate(changes["drift"].items()):
        _draw_line(panel, number, values, f"{teacher}, drift")
        if teacher in changes["changed"]:
            _draw_line(panel, number, changes["changed"][teacher], f"{teacher}, changed", linestyle=(0, (4, 2)))
    panel.set_ylabel("drift, share changed", color=INK)
    _over_episodes(panel, bottom=0.0)


def _draw_line(panel: Any, number: int, values: Sequence[float], title: str, **style: Any) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    panel.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.9, label=title, marker=marker, markersize=4, **style)


def _over_episodes(panel: Any, bottom: float, top: float | None = None) -> None:
    panel.set_ylim(bottom=bottom, top=top)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("episode", color=INK)
    panel.legend(frameon=False, fontsize=9, ncols=2, handlelength=3.2)
