"""The constants of a prototype term, wherever they come from."""

from .back_translation import PrototypicalBackTranslation
from .build import EpisodicClusterer
from .episode import Prototypes, PrototypeTerm
from .online import OnlinePrototypes
from .report import EpisodeReport

__all__ = [
    "EpisodeReport",
    "EpisodicClusterer",
    "OnlinePrototypes",
    "PrototypeTerm",
    "Prototypes",
    "PrototypicalBackTranslation",
]
