"""Pictures of a run: loss curves, an episode's clusters and their sizes, a map of both modalities, sample clusters.

Each function draws on a figure of its own, without pyplot's global state and without a display, writes a PNG and returns its
path. matplotlib is imported when one is called: ``pip install 'protoclip-losses[plots]'``.
"""

from .cluster_grid import cluster_grid
from .cluster_sizes import cluster_sizes
from .episode_report import episode_report
from .loss_curves import loss_curves
from .modality_map import modality_map

__all__ = ["cluster_grid", "cluster_sizes", "episode_report", "loss_curves", "modality_map"]
