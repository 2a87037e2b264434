"""The prototype-level objective of ProtoCLIP (https://arxiv.org/abs/2206.10996) for any CLIP training loop."""

from . import functional
from ._version import __version__
from .back_translation import PrototypicalBackTranslation
from .clustering import ClusteringReport, Clusters, EpisodeReport, EpisodicClusterer, Prototypes, PrototypeTerm
from .collector import FeatureCollector
from .episodes import Episode, EpisodeSampler, FeatureBank
from .heads import ProjectionHead
from .losses import InfoNCE, ProtoLoss, PrototypeLoss
from .online import OnlinePrototypes
from .stream_pass import StreamPass
from .streams import StreamEpisode, StreamEpisodes
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
