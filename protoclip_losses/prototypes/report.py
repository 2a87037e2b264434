"""How an episode's build went: the numbers of its clusterings, their agreement, and their change since the last episode."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from torch import Tensor

from .. import _checks as check
from ..clustering.agreement import adjusted_agreement
from ..clustering.report import ClusteringReport


@dataclass(frozen=True)
class EpisodeReport:
    """How a call of :meth:`EpisodicClusterer.build` went.

    **Use it when:** you log a run: ``prototypes.report.scalars()`` are floats for any logger, and
    ``prototypes.report.plot()`` draws a picture.
    **Not when:** you want to know what the clusters contain: the functions of ``protoclip_losses.metrics`` say that.
    **Related:** :class:`Prototypes`, whose ``report`` it is; :class:`ClusteringReport`, one for each clustering.

    Attributes:
        clusterings: a :class:`ClusteringReport` for each modality and teacher.
        agreement: adjusted Rand index and adjusted mutual information of each two clusterings.
        drift: for each clustering, the mean distance from the centroids in use to the nearest one of the last episode.
        changed: for each clustering, of the samples that the last episode had too, the share whose centroid is nearest to
            another old centroid than their old one.
        seconds: duration of each stage.
        unlabelled: for each teacher, samples without a label: its features are NaN, Inf or all zero, or no sample of the bank
            has their label.
        sizes: for each teacher, samples of the episode in each of its clusters.
        history: agreement, drift and changed shares of the episodes so far, by the names of :meth:`scalars`, this one last.
    """

    clusterings: Mapping[str, ClusteringReport]
    agreement: Mapping[tuple[str, str], tuple[float, float]]
    drift: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    unlabelled: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()

    def scalars(self) -> dict[str, float]:
        """Every number under its own name, for any logger: ``for name, value in report.scalars().items(): ...``"""
        values = {f"{teacher}/{k}": v for teacher, report in self.clusterings.items() for k, v in report.scalars().items()}
        values |= self.comparisons()
        values |= {f"{teacher}/unlabelled": float(v) for teacher, v in self.unlabelled.items()}
        return values | {f"seconds/{stage}": v for stage, v in self.seconds.items()}

    def comparisons(self) -> dict[str, float]:
        """Those of the numbers that compare clusterings: with each other, and with the last episode's."""
        values: dict[str, float] = {}
        for (first, second), (rand, information) in self.agreement.items():
            values |= {f"{first}-{second}/ari": rand, f"{first}-{second}/ami": information}
        values |= {f"{teacher}/drift": v for teacher, v in self.drift.items()}
        return values | {f"{teacher}/changed": v for teacher, v in self.changed.items()}

    def plot(self, path: str | os.PathLike[str] = "episode.png") -> Path:
        """Draw it, by :func:`protoclip_losses.plots.episode_report`; return the path of the PNG."""
        # By name: pictures stand above all that they show, and matplotlib is needed here alone.
        written: Path = check.require("protoclip_losses.plots", "plots").episode_report(self, path)
        return written


def agreements(labels: Mapping[str, Tensor]) -> dict[tuple[str, str], tuple[float, float]]:
    """Adjusted Rand index and adjusted mutual information of each two clusterings (N,) of the same samples."""
    return {(a, b): adjusted_agreement(x, y) for (a, x), (b, y) in combinations(labels.items(), 2)}
