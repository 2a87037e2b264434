"""K-means of rows: one file per engine."""

from .kmeans import Clusters
from .report import ClusteringReport

__all__ = ["ClusteringReport", "Clusters"]
