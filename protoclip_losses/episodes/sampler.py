"""Episodes: which samples of the data, in which order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check


@dataclass(frozen=True)
class Episode:
    """One episode of the data.

    Attributes:
        number: 0, 1, 2, ...
        index: (episode_size,) int64, sample indices in random order, each once; the same on every rank.
    """

    number: int
    index: Tensor

    def shard(self, rank: int, world_size: int) -> Tensor:
        """The samples of one rank: every ``world_size``-th, from ``rank`` on. Shards differ in size by at most one."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
        return self.index[rank::world_size]


def permutation(n: int, *key: int) -> Tensor:
    """(n,) int64, a random order of 0, ..., n - 1 that depends on ``key`` alone."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randperm(n, generator=torch.Generator().manual_seed(state))


class EpisodeSampler:
    """Draws episodes, each without replacement, by a generator seeded by (seed, episode number).

    The draw depends on nothing else: not on the rank, on global random state, or on what was drawn before. So every rank
    draws the same, and a resumed run goes on where it was.

    Args:
        dataset_size: samples in the data set.
        episode_size: samples in an episode.
        seed: of the draw.
        episodes: after how many to end; None for no end.

    Example:
        >>> sampler = EpisodeSampler(dataset_size=10, episode_size=4)
        >>> first = next(iter(sampler))
        >>> first.number, first.index.shape, len(first.shard(rank=0, world_size=3))
        (0, torch.Size([4]), 2)
        >>> sampler.number
        1

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

    def episode(self, number: int) -> Episode:
        """Episode ``number``, without moving the sampler."""
        if number < 0:
            raise ValueError(f"number must be at least 0, got {number}")
        return Episode(number, permutation(self.dataset_size, self.seed, number)[: self.episode_size])

    def __iter__(self) -> Iterator[Episode]:
        """Episodes from the current one on; :attr:`number` is the next to be drawn."""
        while self.episodes is None or self.number < self.episodes:
            episode = self.episode(self.number)
            self.number += 1
            yield episode

    def state_dict(self) -> dict[str, int]:
        """The next episode's number, and what it is drawn from."""
        return {
            "number": self.number,
            "dataset_size": self.dataset_size,
            "episode_size": self.episode_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was; raises ValueError if it draws from something else."""
        for name in ("dataset_size", "episode_size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state_dict has {name}={state[name]} but this sampler has {name}={getattr(self, name)}")
        self.number = state["number"]
