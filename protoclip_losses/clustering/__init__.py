"""K-means of rows: one file per engine."""

from .agreement import adjusted_mutual_info_score, adjusted_rand_score
from .kmeans import Clusters
from .report import ClusteringReport

__all__ = ["ClusteringReport", "Clusters", "adjusted_mutual_info_score", "adjusted_rand_score"]
