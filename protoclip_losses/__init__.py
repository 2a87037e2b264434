"""The prototype-level objective of ProtoCLIP (https://arxiv.org/abs/2206.10996) for any CLIP training loop."""

from . import _deprecated, functional
from ._version import __version__
from .clustering import ClusteringReport, Clusters
from .episodes import Episode, EpisodeSampler, FeatureBank, FeatureCollector, StreamEpisode, StreamEpisodes, StreamPass
from .heads import ProjectionHead
from .losses import InfoNCE, ProtoLoss, PrototypeLoss
from .prototypes import EpisodeReport, EpisodicClusterer, OnlinePrototypes, Prototypes, PrototypeTerm, PrototypicalBackTranslation
from .teachers import TeacherAdapter

__all__ = [
    "ClusteringReport",
    "Clusters",
    "Episode",
    "EpisodeReport",
    "EpisodeSampler",
    "EpisodicClusterer",
    "FeatureBank",
    "FeatureCollector",
    "InfoNCE",
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

_deprecated.install()
