"""External teachers: features of every sample, by sample index."""

from .adapter import TeacherAdapter
from .captions import WordEncoder
from .pca import PCA
from .words import words

__all__ = ["PCA", "TeacherAdapter", "WordEncoder", "words"]
