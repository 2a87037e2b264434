"""The prototype-level objective of ProtoCLIP (https://arxiv.org/abs/2206.10996) for any CLIP training loop."""

from . import functional
from ._version import __version__
from .clustering import ClusteringReport, KMeans, KMeansResult
from .episodes import Episode, EpisodeSampler, FeatureBank, FeatureCollector, StreamEpisode, StreamEpisodes, StreamPass
from .heads import ProjectionHead
from .losses import InfoNCE, ProtoLoss, PrototypeLoss
from .prototypes import EpisodeReport, EpisodicClusterer, OnlinePrototypes, Prototypes, PrototypeTerm, PrototypicalBackTranslation
from .teachers import TeacherAdapter

__all__ = [
    "ClusteringReport",
    "Episode",
    "EpisodeReport",
    "EpisodeSampler",
    "EpisodicClusterer",
    "FeatureBank",
    "FeatureCollector",
    "InfoNCE",
    "KMeans",
    "KMeansResult",
    "OnlinePrototypes",
    "ProjectionHead",
    "ProtoLoss",
    "PrototypeLoss",
    "PrototypeTerm",
    "Prototypes",
    "PrototypicalBackTranslation",
    "StreamEpisode",
    "StreamEpisodes",
    "StreamPass",
    "TeacherAdapter",
    "__version__",
    "functional",
]
