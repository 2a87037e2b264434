"""Both modalities on one plane."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..functional._labels import label_range
from ._style import COLOURS, INK, PathLike, new_figure, plain_axes, save


def modality_map(image: Tensor, text: Tensor, categories: Tensor | None, names: Sequence[str] | None, path: PathLike) -> Path:
    r"""Draw both modalities on one plane, coloured by category; images are dots and texts are crosses.

    The plane is that of the two leading principal axes of all L2-normalised features together,

    .. math::
        p_i = \Big( \frac{z_i}{\lVert z_i \rVert_2} - \mu \Big) V_2

    so that the distance between the two clouds on it is the visible part of the modality gap. Two diamonds joined by a dashed
    line are the means of the modalities.

    **Use it when:** you want to see the gap, and whether categories lie apart in both modalities alike.
    **Not when:** the number is enough, or the axes' shares of the variance are small: most of the gap may be on other axes.
    **Related:** :func:`~protoclip_losses.metrics.modality_gap` measures the gap in all dimensions.

    Args:
        image: (N, d), image features of any finite scale, N and d at least 2.
        text: (N, d), text features; row i belongs to image i.
        categories: (N,), any integer dtype: the class of each pair, in [0, len(names)). None colours by modality.
        names: a name per class; None if `categories` is. Of more than twelve classes, all but the eleven largest share a colour.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: features that are not floating-point tensors, categories that are not integers.
        ValueError: shapes that do not match, fewer than 2 pairs, a value that is not finite, categories outside the names.

    Example:
        >>> import tempfile
        >>> import torch
        >>> folder, z = tempfile.mkdtemp(), torch.eye(4)
        >>> modality_map(z, z.flip(0), torch.tensor([0, 0, 1, 1]), ["cats", "dogs"], f"{folder}/map.png").name
        'map.png'

    Source:
        Modality gap: Liang et al., "Mind the Gap", NeurIPS 2022, https://arxiv.org/abs/2203.02053.
    """
    check.matrix("image", image)
    check.matrix("text", text, rows=image.shape[0], width=image.shape[1], of=" as image")
    if min(image.shape) < 2:
        raise ValueError(f"image must have at least 2 rows and 2 columns, got shape {check.shape(image)}")
    for name, features in (("image", image), ("text", text)):
        check.finite(name, features)
    if (categories is None) != (names is None):
        raise ValueError("categories and names must be given together, got one without the other")
    if categories is not None and names is not None:
        check.integers("categories", categories, length=len(image), of=" as image has rows", any_dtype=True)
        label_range("categories", categories, len(names), " as names has entries")
    plane, shares = _principal_plane(image, text)
    figure = new_figure(10.0, 6.6)
    panel = figure.subplots()
    colour_of, titles = (None, []) if categories is None or names is None else _coloured(categories, names)
    handles, labels = _draw_clouds(panel, plane, colour_of)
    for colour, title in zip(COLOURS, titles, strict=False):
        handles.append(panel.scatter([], [], c=colour, marker="s", s=52, linewidths=0))
        labels.append(textwrap.shorten(title, 28, placeholder="..."))
    legend = panel.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=0.7)
    for entry in legend.get_texts():
        entry.set_parse_math(False)  # a name may hold dollar signs
    panel.set_title("Images and texts on their two leading principal axes", loc="left", fontsize=13, color=INK)
    panel.set_xlabel(f"first axis ({float(shares[0]):.0%} of the variance)", color=INK)
    panel.set_ylabel(f"second axis ({float(shares[1]):.0%})", color=INK)
    plain_axes(panel)
    panel.set_aspect("equal", adjustable="datalim")
    return save(figure, path)


def _principal_plane(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The points of both modalities, (2, N, 2), and the two axes' shares of the variance, in float64 on the CPU."""
    both = torch.cat([image.detach().cpu().double(), text.detach().cpu().double()])
    both = both / both.abs().amax(1, keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)  # squares stay in the dtype's range
    both = torch.nn.functional.normalize(both, dim=1)
    centred = both - both.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes[:2].T
    return plane.view(2, len(image), 2), plane.var(0) / centred.var(0).sum().clamp(min=1e-30)


def _coloured(categories: Tensor, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The colour of each pair, and what each colour in turn stands for; small categories share one where colours run out."""
    numbers, inverse, sizes = torch.unique(categories.cpu().long(), return_inverse=True, return_counts=True)
    titles = [names[number] for number in numbers.tolist()]
    colours = torch.arange(len(numbers), device=numbers.device)
    if len(numbers) > len(COLOURS):
        own = len(COLOURS) - 1
        largest = sizes.argsort(descending=True, stable=True)[:own].sort().values
        colours = torch.full_like(numbers, own).index_copy(0, largest, torch.arange(own, device=numbers.device))
        titles = [*(titles[i] for i in largest.tolist()), f"{len(numbers) - own} others"]
    return [COLOURS[i] for i in colours[inverse].tolist()], titles


def _draw_clouds(panel: Any, plane: Tensor, colour_of: Sequence[str] | None) -> tuple[list[Any], list[str]]:
    """Draw the points and the means of both modalities; return what the legend shows and says of them."""
    means = plane.mean(1)
    style = {"linewidth": 1.2, "linestyle": (0, (4, 3)), "marker": "D", "markersize": 6.5, "markerfacecolor": "white"}
    (gap,) = panel.plot(*means.T.numpy(), color=INK, zorder=5, **style)
    handles = []
    for points, marker, size, own in zip(plane, "ox", (16, 20), COLOURS, strict=False):
        edge = {"linewidths": 0.0 if marker == "o" else 1.0}
        panel.scatter(*points.T.numpy(), c=colour_of or own, marker=marker, s=size, alpha=0.6, **edge)
        handles.append(panel.scatter([], [], c=INK if colour_of else own, marker=marker, s=42, **edge))
    return [*handles, gap], ["images", "texts", "their means"]
