"""External teachers: features of every sample, by sample index."""

from .adapter import TeacherAdapter
from .pca import PCA

__all__ = ["PCA", "TeacherAdapter"]
