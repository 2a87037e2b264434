"""Which samples of the data make an episode, and their features."""

from .bank import FeatureBank
from .collector import FeatureCollector
from .extraction import EpisodeOrder, WithIndex, extract
from .sampler import Episode, EpisodeSampler
from .shard_reader import StreamPass
from .stream import StreamEpisode, StreamEpisodes

__all__ = [
    "Episode",
    "EpisodeOrder",
    "EpisodeSampler",
    "FeatureBank",
    "FeatureCollector",
    "StreamEpisode",
    "StreamEpisodes",
    "StreamPass",
    "WithIndex",
    "extract",
]
