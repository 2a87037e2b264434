"""Episodes over shards that have no index: WebDataset tar files, Parquet files, anything that is read from its beginning."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from .. import _checks as check
from .sampler import permutation
from .shard_reader import Lanes, StreamPass


class StreamEpisodes:
    """Cuts an endless stream of shards into episodes: the list of shards again and again, each time in another order.

    The order is drawn from (seed, round), so that every rank sees the same and a resumed run goes on where it was. Nothing is
    read here. An episode that spans two rounds may hold a shard twice, as different samples.

    Args:
        shards: names of the shards, in whatever form ``read`` takes them: paths, URLs, commands.
        shards_per_episode: shards in an episode; the memory of an episode grows with it.
        seed: of the order.
        episodes: after how many to end; None for no end.

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

    def episode(self, number: int) -> "StreamEpisode":
        """Episode ``number``, without moving the stream."""
        if number < 0:
            raise ValueError(f"number must be at least 0, got {number}")
        places = range(number * self.shards_per_episode, (number + 1) * self.shards_per_episode)
        rounds = {p // len(self.shards) for p in places}
        order = {r: permutation(len(self.shards), self.seed, r).tolist() for r in rounds}
        shards = (self.shards[order[p // len(self.shards)][p % len(self.shards)]] for p in places)
        return StreamEpisode(number, tuple(shards), self.seed)

    def __iter__(self) -> Iterator["StreamEpisode"]:
        """Episodes from the current one on; :attr:`number` is the next to be drawn."""
        while self.episodes is None or self.number < self.episodes:
            episode = self.episode(self.number)
            self.number += 1
            yield episode

    def state_dict(self) -> dict[str, Any]:
        """The next episode's number, and what it is cut from."""
        names = hashlib.sha256("\0".join(self.shards).encode()).hexdigest()
        return {"number": self.number, "shards": names, "shards_per_episode": self.shards_per_episode, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was; raises ValueError if it is of other shards, or cuts them otherwise."""
        for name, own in self.state_dict().items():
            if name != "number" and state[name] != own:
                raise ValueError(f"state_dict has {name}={state[name]} but this stream has {name}={own}")
        self.number = state["number"]


@dataclass(frozen=True)
class StreamEpisode:
    """A stretch of the stream, to be passed twice: for extraction and for training.

    A sample's number is ``place of its shard in the episode * 2**32 + place in its shard``: the same in both passes, on any
    number of ranks and loader workers, and never given twice.

    Attributes:
        number: 0, 1, 2, ...
        shards: names of the shards, in the order in which they are read.
        seed: of the order of samples.
    """

    number: int
    shards: tuple[str, ...]
    seed: int

    def batches(
        self,
        read: Callable[[str], Iterable[Any]],
        decode: Callable[[Any], Any],
        batch_size: int,
        *,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: int = 1,
        only: Tensor | None = None,
        max_dropped: float = 0.01,
        collate: Callable[[list[Any]], Any] = default_collate,
        **loader: Any,
    ) -> "StreamPass":
        """One pass over this rank's shards (every ``world_size``-th): batches of ``(index (b,), collate(decoded samples))``.

        Args:
            read: shard name to its raw samples, in a fixed order.
            decode: raw sample to decoded sample. A sample for which it raises is left out and counted in
                ``dropped``, and the batch is smaller.
            batch_size: samples in a batch.
            workers: loader processes, which take a shard each. With 0, this process reads.
            rank, world_size: whose shards.
            shuffle: raw samples that a worker holds and puts in random order, drawn from (seed, episode); 1 for none.
            only: (n,) int64; leave out all samples but these. In training, those of extraction, so that one that failed there
                and not here (a network) is not trained.
            max_dropped: the share of samples, of the first thousand at least, above which it is an error.
            collate: a list of decoded samples to a batch.
            loader: further arguments of ``torch.utils.data.DataLoader``, such as ``generator``.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
        if world_size > len(self.shards):
            raise ValueError(f"world_size={world_size} ranks must have a shard each, got {len(self.shards)} in an episode")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ValueError(f"workers must be an int of at least 0, got {workers!r}")
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped must be a share in [0, 1], got {max_dropped}")
        if only is not None:
            check.integers("only", only)
            only = only.cpu().sort().values
        check.positive_int("batch_size", batch_size), check.positive_int("shuffle", shuffle)
        lanes = Lanes(self, read, decode, batch_size, range(rank, len(self.shards), world_size), shuffle, only, collate, workers)
        return StreamPass(lanes, max_dropped, loader)
