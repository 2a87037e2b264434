"""The constants of a prototype term, wherever they come from."""

from .back_translation import PrototypicalBackTranslation
from .batch_features import BatchFeatures
from .build import EpisodicClusterer
from .clustering import Clustering
from .episode import Prototypes
from .online import OnlinePrototypes
from .report import EpisodeReport
from .source import PrototypeSource, PrototypeTerm

__all__ = [
    "BatchFeatures",
    "Clustering",
    "EpisodeReport",
    "EpisodicClusterer",
    "OnlinePrototypes",
    "PrototypeSource",
    "PrototypeTerm",
    "Prototypes",
    "PrototypicalBackTranslation",
]
