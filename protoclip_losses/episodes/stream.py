"""Episodes over shards that have no index: WebDataset tar files, Parquet files, anything that is read from its beginning."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.utils.data import default_collate

from .. import _checks as check
from ..teachers.cache_record import joined_digest, strings_digest
from .sampler import permutation, saved_count, shard_slice
from .shard_reader import ShardReader, StreamPass

P = ParamSpec("P")
T = TypeVar("T")


def renamed_keywords(**renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that also takes its keywords under their old names, with a FutureWarning; both at once is a TypeError."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in renamed.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{function.__name__} must be given {new} alone, got {old} as well, its old name")
                check.warn_renamed(f"{function.__name__}({old}=)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


class StreamEpisodes:
    """Cuts an endless stream of shards into episodes: the list of shards again and again, in another order each time.

    The order is drawn from (seed, round), so that every rank sees the same and a resumed run continues with it. Nothing is
    read here. An episode that spans two rounds may hold a shard twice, as different samples.

    **Use it when:** the data are shards that are read from their beginning, and nobody knows how many samples they hold.
    **Not when:** sample ``i`` can be asked for: :class:`EpisodeSampler` draws samples and not whole shards.
    **Related:** :class:`FeatureCollector` collects the features of an episode; :class:`StreamPass` is one pass over it.

    Args:
        shards: names of the shards, in whatever form ``read`` takes them: paths, URLs, commands.
        shards_per_episode: shards in an episode; the memory of an episode grows with it.
        seed: of the order.
        episodes: number of episodes after which iteration ends; None for no end.

    Raises:
        TypeError: shards that are no list of strings, numbers that are not ints.
        ValueError: ``shards_per_episode`` larger than the number of shards; numbers below 1, a negative seed.

    Example:
        >>> stream = StreamEpisodes([f"{i:05d}.tar" for i in range(6)], shards_per_episode=4)
        >>> episode = next(iter(stream))
        >>> episode.number, episode.shards
        (0, ('00001.tar', '00004.tar', '00005.tar', '00003.tar'))
        >>> first_pass = episode.batches(lambda shard: [shard, "one more"], str.upper, batch_size=3)
        >>> next(iter(first_pass))
        (tensor([         0,          1, 4294967296]), ['00001.TAR', 'ONE MORE', '00004.TAR'])

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996: "online episodic training".
    """

    def __init__(self, shards: Sequence[str], shards_per_episode: int, *, seed: int = 0, episodes: int | None = None) -> None:
        self.shards = check.strings("shards", shards)
        self.shards_per_episode = check.positive_int("shards_per_episode", shards_per_episode)
        if shards_per_episode > len(self.shards):
            raise ValueError(f"shards_per_episode must be at most the {len(self.shards)} shards, got {shards_per_episode}")
        self.seed = check.seed("seed", seed)
        self.episodes = None if episodes is None else check.positive_int("episodes", episodes)
        self.number = 0

    def __repr__(self) -> str:
        return (
            f"StreamEpisodes({len(self.shards)} shards, shards_per_episode={self.shards_per_episode}, seed={self.seed}, "
            f"episodes={self.episodes}, number={self.number})"
        )

    def episode(self, number: int) -> "StreamEpisode":
        """Episode ``number``, without moving the stream."""
        if number < 0:
            raise ValueError(f"number must be at least 0, got {number}")
        positions = range(number * self.shards_per_episode, (number + 1) * self.shards_per_episode)
        rounds = {position // len(self.shards) for position in positions}
        order = {r: permutation(len(self.shards), self.seed, r).tolist() for r in rounds}
        shards = (self.shards[order[p // len(self.shards)][p % len(self.shards)]] for p in positions)
        return StreamEpisode(number, tuple(shards), self.seed)

    def __iter__(self) -> Iterator["StreamEpisode"]:
        """Episodes from the current one on; :attr:`number` is the next to be drawn."""
        while self.episodes is None or self.number < self.episodes:
            episode = self.episode(self.number)
            self.number += 1
            yield episode

    def _settings(self, digest: Callable[[Sequence[str]], str] = strings_digest) -> dict[str, Any]:
        return {"shards": digest(self.shards), "shards_per_episode": self.shards_per_episode, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The next episode's number, and the shards and settings that it is drawn from."""
        return {"format": 1, "number": self.number, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the episode of ``state``; raises ValueError if it was made of other shards or with other settings."""
        is_of_0_6 = check.state_format("StreamEpisodes", state) == 0
        check.state_matches("StreamEpisodes", state, self._settings(joined_digest if is_of_0_6 else strings_digest))
        self.number = saved_count("StreamEpisodes", state, "number")


@dataclass(frozen=True, repr=False)
class StreamEpisode:
    """A part of the stream that is read twice: for extraction and for training.

    The index of a sample is ``shard_id * 2**32 + row``: the position of its shard in the episode, and its position in the shard.
    It is the same in both passes, on any number of ranks and loader workers, and no two samples share one.

    **Use it when:** you loop over :class:`StreamEpisodes`, which makes them.
    **Not when:** sample ``i`` can be asked for: that is an :class:`Episode`.
    **Related:** :class:`StreamPass` is what :meth:`batches` returns; :class:`FeatureCollector` collects its features.

    Attributes:
        number: 0, 1, 2, ...
        shards: names of the shards, in the order in which they are read.
        seed: of the order of samples.
    """

    number: int
    shards: tuple[str, ...]
    seed: int

    def __repr__(self) -> str:
        return f"StreamEpisode(number={self.number}, {len(self.shards)} shards from {self.shards[0]!r} on, seed={self.seed})"

    @renamed_keywords(workers="num_workers", shuffle="shuffle_buffer", collate="collate_fn")
    def batches(
        self,
        read: Callable[[str], Iterable[Any]],
        decode: Callable[[Any], Any],
        batch_size: int,
        *,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1,
        only: Tensor | None = None,
        max_dropped: float = 0.01,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        **loader: Any,
    ) -> StreamPass:
        """One pass over this rank's shards (every ``world_size``-th): batches of ``(index (b,), collate_fn(decoded samples))``.

        Args:
            read: shard name to its raw samples, in a fixed order.
            decode: raw sample to decoded sample. A sample for which it raises is left out and counted in
                ``dropped``, and the batch is smaller.
            batch_size: samples in a batch.
            num_workers: loader processes, which read a shard each. With 0, this process reads.
            rank, world_size: of this process, and the number of processes.
            shuffle_buffer: raw samples that a worker holds and puts in random order, drawn from (seed, episode); 1 for none.
            only: (n,) int64; leave out all samples but these. In training, those of extraction, so that one that failed there
                and not here (a network) is not trained.
            max_dropped: the share of samples, of the first thousand at least, above which it is an error.
            collate_fn: a list of decoded samples to a batch.
            loader: further arguments of ``torch.utils.data.DataLoader``, such as ``generator``.

        Raises:
            ValueError: a rank outside [0, world_size), fewer shards than ranks, numbers out of range.
            TypeError: numbers that are not ints, an ``only`` that is not int64.
        """
        share = shard_slice(rank, world_size)
        if world_size > len(self.shards):
            raise ValueError(f"world_size={world_size} ranks must have a shard each, got {len(self.shards)} in an episode")
        check.at_least("num_workers", num_workers, 0)
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped must be a share in [0, 1], got {max_dropped}")
        if only is not None:
            check.integers("only", only)
            only = only.cpu().sort().values
        check.positive_int("batch_size", batch_size), check.positive_int("shuffle_buffer", shuffle_buffer)
        reader = ShardReader(
            self.shards,
            self.number,
            self.seed,
            read,
            decode,
            batch_size,
            range(len(self.shards))[share],
            shuffle_buffer,
            only,
            collate_fn,
            num_workers,
        )
        return StreamPass(reader, max_dropped, loader)
