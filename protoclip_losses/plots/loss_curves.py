"""Loss curves of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._style import COLOURS, GREY, INK, PathLike, new_figure, plain_axes, save

LOSSES = {
    "loss": "total",
    "contrastive_loss": "InfoNCE",
    "proto_loss": "prototypes, image and text",
    "proto_external_loss": "prototypes, external teachers",
}
SCALES = {"logit_scale": "InfoNCE", "logit_scale_proto": "prototypes"}

Records = Sequence[Mapping[str, float]]


def loss_curves(records: Records, path: PathLike) -> Path:
    r"""Draw every logged loss over the training steps: the total dashed, each term faint under its running mean.

    The running mean of value :math:`v_t` over a window w of a twentieth of the records is
    :math:`\tfrac{1}{w} \sum_{u=t-w+1}^{t} v_u`, over the values there are; it restarts where a term was switched off (logged as
    an exact zero), which is a gap in its line.

    **Use it when:** a run has written its losses, for instance the ``metrics.jsonl`` of the example.
    **Not when:** you watch a run: the same numbers go to any logger.
    **Related:** :class:`~protoclip_losses.ProtoLoss` returns these names with ``output_dict=True``.

    Args:
        records: one mapping per logged step, with ``"step"`` and any of ``"loss"``, ``"contrastive_loss"``, ``"proto_loss"``,
            ``"proto_external_loss"``; a term whose values are all zero is left out. ``"logit_scale"`` and
            ``"logit_scale_proto"`` go to a second panel.
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
    if len(records) == 0:
        raise ValueError("records must have at least one record, got none")
    for number, record in enumerate(records):
        if "step" not in record:
            raise ValueError(f"records must have a 'step' in each, got one without at position {number}")
    losses = {name: title for name, title in LOSSES.items() if any(record.get(name) for record in records)}
    scales = {name: title for name, title in SCALES.items() if any(name in record for record in records)}
    if not losses:
        raise ValueError(f"records must have a value other than zero of {', '.join(LOSSES)}, got none")
    figure = new_figure(9.0, 6.2 if scales else 4.2)
    heights = [3, 1.2] if scales else [1]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    _draw_losses(panels[0], losses, records)
    if scales:
        _draw_scales(panels[1], scales, records)
    for panel in panels:
        panel.margins(x=0.01)
        plain_axes(panel)
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel("training step", color=INK)
    panels[0].set_title("Training losses", loc="left", fontsize=13, color=INK)
    return save(figure, path)


def _draw_losses(panel: Any, losses: Mapping[str, str], records: Records) -> None:
    colours = iter(COLOURS)
    for name, title in losses.items():
        # A term that is switched off (warm-up, LiT) is logged as an exact zero: a gap in its line, not a fall to zero.
        steps, values = _line(name, records)
        values = [value or math.nan for value in values]
        if name == "loss":
            # The sum jumps wherever a term is switched on or off: a running mean would draw a slope there.
            panel.plot(steps, values, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label=title, zorder=3, marker=_dot(steps))
            continue
        colour = next(colours)
        panel.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
        means = running_mean(values, max(1, len(values) // 20))
        panel.plot(steps, means, color=colour, linewidth=1.9, label=title, marker=_dot(steps))
    panel.set_ylabel("loss", color=INK)
    panel.legend(frameon=False, fontsize=9)


def _draw_scales(panel: Any, scales: Mapping[str, str], records: Records) -> None:
    for colour, (name, title) in zip(COLOURS, scales.items(), strict=False):
        steps, values = _line(name, records)
        panel.plot(steps, values, color=colour, linewidth=1.9, label=title, marker=_dot(steps))
    panel.set_ylabel("logit scale", color=INK)
    panel.legend(frameon=False, fontsize=9, ncols=2)


def _line(name: str, records: Records) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have this name."""
    having = [record for record in records if name in record]
    return [record["step"] for record in having], [float(record[name]) for record in having]


def _dot(steps: Sequence[float]) -> str:
    """The marker of a line: a line of one point is invisible without."""
    return "o" if len(steps) == 1 else ""


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means of the last ``window`` values, restarted after each gap (NaN)."""
    means: list[float] = []
    run: list[float] = []
    for value in values:
        run = [] if math.isnan(value) else [*run, value][-window:]
        means.append(sum(run) / len(run) if run else math.nan)
    return means
