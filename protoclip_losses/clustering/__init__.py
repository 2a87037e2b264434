"""K-means of rows: the public class, and one file for each engine; and how far two labelings agree."""

from .agreement import adjusted_mutual_info_score, adjusted_rand_score
from .kmeans import KMeans
from .report import ClusteringReport
from .result import KMeansResult

__all__ = ["ClusteringReport", "KMeans", "KMeansResult", "adjusted_mutual_info_score", "adjusted_rand_score"]
