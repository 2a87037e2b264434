"""The prototype-level objective of ProtoCLIP (https://arxiv.org/abs/2206.10996) for any CLIP training loop."""

from . import _deprecated, functional
from ._version import __version__
from .clustering import ClusteringReport, KMeans, KMeansResult
from .episodes import (
    Episode,
    EpisodeOrder,
    EpisodeSampler,
    FeatureBank,
    FeatureCollector,
    StreamEpisode,
    StreamEpisodes,
    StreamPass,
    WithIndex,
    extract,
)
from .heads import ProjectionHead, ProjectionHeads
from .losses import GradCache, InfoNCE, ProtoLoss, PrototypeLoss, RelationalDistillation, SigmoidPairLoss
from .prototypes import (
    Clustering,
    EpisodeReport,
    EpisodicClusterer,
    OnlinePrototypes,
    Prototypes,
    PrototypeSource,
    PrototypeTerm,
    PrototypicalBackTranslation,
)
from .teachers import TeacherAdapter

__all__ = [
    "Clustering",
    "ClusteringReport",
    "Episode",
    "EpisodeOrder",
    "EpisodeReport",
    "EpisodeSampler",
    "EpisodicClusterer",
    "FeatureBank",
    "FeatureCollector",
    "GradCache",
    "InfoNCE",
    "KMeans",
    "KMeansResult",
    "OnlinePrototypes",
    "ProjectionHead",
    "ProjectionHeads",
    "ProtoLoss",
    "PrototypeLoss",
    "PrototypeSource",
    "PrototypeTerm",
    "Prototypes",
    "PrototypicalBackTranslation",
    "RelationalDistillation",
    "SigmoidPairLoss",
    "StreamEpisode",
    "StreamEpisodes",
    "StreamPass",
    "TeacherAdapter",
    "WithIndex",
    "__version__",
    "extract",
    "functional",
]

_deprecated.install()
