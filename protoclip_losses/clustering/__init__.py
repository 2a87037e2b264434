"""K-means of rows: the public class, and one file for each engine."""

from .kmeans import KMeans, KMeansResult
from .report import ClusteringReport

__all__ = ["ClusteringReport", "KMeans", "KMeansResult"]
