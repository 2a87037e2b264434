"""Episodic clustering: K-means of an episode's features, and the prototypes made from it. One file per engine."""

from .clusterer import EpisodicClusterer
from .clusters import Clusters
from .prototypes import Prototypes, PrototypeTerm
from .report import ClusteringReport, EpisodeReport

__all__ = ["ClusteringReport", "Clusters", "EpisodeReport", "EpisodicClusterer", "PrototypeTerm", "Prototypes"]
