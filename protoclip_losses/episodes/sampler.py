"""Episodes: which samples of the data, in which order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check


@dataclass(frozen=True, repr=False)
class Episode:
    """One episode of the data.

    **Use it when:** you loop over an :class:`EpisodeSampler`, which makes them.
    **Not when:** the data are shards without an index; that is :class:`StreamEpisode`.
    **Related:** :class:`FeatureBank` holds the features of ``index``; :class:`EpisodeOrder` is the same order as a sampler of a
    ``DataLoader``.

    Attributes:
        number: 0, 1, 2, ...
        index: (episode_size,) int64, sample indices in random order, each once; the same on every rank.
    """

    number: int
    index: Tensor

    def __repr__(self) -> str:
        return f"Episode(number={self.number}, {len(self.index)} samples)"

    def shard(self, rank: int, world_size: int) -> Tensor:
        """The samples of one rank: every ``world_size``-th, from ``rank`` on. Shards differ in size by at most one."""
        return self.index[shard_slice(rank, world_size)].clone()  # a view would keep and save the samples of all ranks


def shard_slice(rank: int, world_size: int) -> slice:
    """This rank's share of a sequence: every ``world_size``-th entry, from ``rank`` on."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
    return slice(rank, None, world_size)


def permutation(n: int, *key: int) -> Tensor:
    """(n,) int64 on the CPU, a random order of 0, ..., n - 1 that depends on ``key`` alone."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randperm(n, generator=torch.Generator(device="cpu").manual_seed(state), device="cpu")


def saved_count(owner: str, state: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 0 in a saved state, under its name."""
    check.state_has(owner, state, [name])
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"state_dict[{name!r}] of {owner} must be an int of at least 0, got {value!r}")
    return value


class EpisodeSampler:
    """Draws episodes, each without replacement, by a generator seeded by (seed, episode number).

    The draw depends on nothing else: not on the rank, on global random state, or on what was drawn before. So every rank
    draws the same, and a resumed run continues with the same episodes.

    **Use it when:** the data set has a length and sample ``i`` can be asked for.
    **Not when:** the data are shards that are read from their beginning; use :class:`StreamEpisodes`.
    **Related:** :class:`EpisodeOrder` is the sampler for a ``torch.utils.data.DataLoader``; :class:`FeatureBank` holds the
    features of an episode; :class:`EpisodicClusterer` builds prototypes of them.

    Args:
        dataset_size: samples in the data set.
        episode_size: samples in an episode.
        seed: of the draw.
        episodes: number of episodes after which iteration ends; None for no end.

    Raises:
        ValueError: ``episode_size`` larger than ``dataset_size``; sizes or ``episodes`` below 1, a negative seed.
        TypeError: a size or a seed that is not an int.

    Example:
        >>> sampler = EpisodeSampler(dataset_size=10, episode_size=4)
        >>> first = next(iter(sampler))
        >>> first.number, first.index.shape, len(first.shard(rank=0, world_size=3))
        (0, torch.Size([4]), 2)
        >>> sampler
        EpisodeSampler(dataset_size=10, episode_size=4, seed=0, episodes=None, number=1)

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996, which draws with replacement.
    """

    def __init__(self, dataset_size: int, episode_size: int, *, seed: int = 0, episodes: int | None = None) -> None:
        self.dataset_size = check.positive_int("dataset_size", dataset_size)
        self.episode_size = check.positive_int("episode_size", episode_size)
        if episode_size > dataset_size:
            raise ValueError(f"episode_size must be at most dataset_size={dataset_size}, got {episode_size}")
        self.seed = check.seed("seed", seed)
        self.episodes = None if episodes is None else check.positive_int("episodes", episodes)
        self.number = 0

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
        return f"EpisodeSampler({settings}, episodes={self.episodes}, number={self.number})"

    def episode(self, number: int) -> Episode:
        """Episode ``number``, without moving the sampler."""
        if number < 0:
            raise ValueError(f"number must be at least 0, got {number}")
        drawn = permutation(self.dataset_size, self.seed, number)[: self.episode_size]
        return Episode(number, drawn.clone())  # a view would keep and save the permutation of the whole data set

    def __iter__(self) -> Iterator[Episode]:
        """Episodes from the current one on; :attr:`number` is the next to be drawn."""
        while self.episodes is None or self.number < self.episodes:
            episode = self.episode(self.number)
            self.number += 1
            yield episode

    def _settings(self) -> dict[str, int]:
        return {"dataset_size": self.dataset_size, "episode_size": self.episode_size, "seed": self.seed}

    def state_dict(self) -> dict[str, int]:
        """The next episode's number, and the settings that it is drawn from."""
        return {"format": 1, "number": self.number, **self._settings()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with the episode of ``state``; raises ValueError if it was made with other settings."""
        check.state_format("EpisodeSampler", state)
        check.state_matches("EpisodeSampler", state, self._settings())
        self.number = saved_count("EpisodeSampler", state, "number")
