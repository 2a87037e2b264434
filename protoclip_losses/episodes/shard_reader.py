"""One pass over an episode of a stream: reading, numbering, order, and how far it is."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .sampler import permutation

if TYPE_CHECKING:
    from .stream import StreamEpisode

SHARD = 2**32  # sample numbers of one shard: more than any file has samples


@dataclass
class Piece:
    """``batch_size`` consecutive samples of a lane, less those that were left out."""

    lane: int
    samples: int
    dropped: int
    index: Tensor
    batch: Any
    error: str


@dataclass(eq=False)
class Lanes(IterableDataset[Piece]):
    """What a worker runs. Its lane is every ``num_lanes``-th shard of the rank; pieces come from the lanes in turn."""

    episode: "StreamEpisode"
    read: Callable[[str], Iterable[Any]]
    decode: Callable[[Any], Any]
    batch_size: int
    places: range
    shuffle: int
    only: Tensor | None
    collate: Callable[[list[Any]], Any]
    workers: int

    def __post_init__(self) -> None:
        # Samples of each shard, -1 until it was read to its end. Shared: the one worker that reads a shard writes its size.
        self.sizes = torch.full((len(self.episode.shards),), -1, dtype=torch.int64)
        self.sizes.share_memory_()  # type: ignore[no-untyped-call]
        self.pieces = [0] * max(1, self.workers)  # handed out, of each lane
        self.turn = 0  # the lane that is next

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        # After a resume the first worker takes the lane whose turn it is, and so on.
        lane = (self.turn + (0 if worker is None else worker.id)) % len(self.pieces)
        shuffled = self._shuffled(lane, self.pieces[lane] * self.batch_size)
        while part := list(islice(shuffled, self.batch_size)):
            yield self._decoded(lane, part)

    def _decoded(self, lane: int, part: list[tuple[int, Any]]) -> Piece:
        numbers, decoded, dropped, error = [], [], 0, ""
        for number, raw in part:
            if self.only is not None and not _holds(self.only, number):
                continue
            try:
                decoded.append(self.decode(raw))
                numbers.append(number)
            except Exception as problem:  # whatever a decoder raises on broken bytes
                dropped += 1
                error = f"{type(problem).__name__}: {problem} (sample {number % SHARD} of {self.episode.shards[number // SHARD]})"
        batch = self.collate(decoded) if decoded else None
        return Piece(lane, len(part), dropped, torch.tensor(numbers, dtype=torch.int64), batch, error)

    def _shuffled(self, lane: int, skip: int) -> Iterator[tuple[int, Any]]:
        """The lane's samples, from its ``skip``-th on, each block of ``shuffle`` in an order of its own."""
        block_number = skip // self.shuffle
        samples = self._numbered(lane, block_number * self.shuffle)
        skip %= self.shuffle
        while block := list(islice(samples, self.shuffle)):
            order = permutation(len(block), self.episode.seed, self.episode.number, self.places[lane], block_number)
            yield from (block[i] for i in order[skip:].tolist())
            block_number, skip = block_number + 1, 0

    def _numbered(self, lane: int, skip: int) -> Iterator[tuple[int, Any]]:
        """The lane's raw samples with their numbers, from its ``skip``-th on; a shard that lies before is not opened again."""
        for place in self.places[lane :: len(self.pieces)]:
            if 0 <= (size := int(self.sizes[place])) <= skip:
                skip -= size
                continue
            size = 0
            for raw in self.read(self.episode.shards[place]):
                if size >= skip:
                    yield place * SHARD + size, raw
                size += 1
            self.sizes[place] = size
            skip = max(0, skip - size)


def _holds(ordered: Tensor, number: int) -> bool:
    place = int(torch.searchsorted(ordered, number))
    return place < len(ordered) and int(ordered[place]) == number


class StreamPass:
    """An iterable of batches that knows how far it is. Made by :meth:`StreamEpisode.batches`.

    Its ``state_dict()``, taken between two batches, lets a new process go on with the next one, in the same order and under the
    same numbers, with the same number of workers. Shards that were passed are not opened again.

    Attributes:
        samples: seen by this rank so far, in this pass.
        dropped: those of them that ``decode`` failed for.
    """

    def __init__(self, lanes: Lanes, max_dropped: float, loader: Mapping[str, Any]) -> None:
        self._lanes, self._max_dropped, self._loader = lanes, max_dropped, dict(loader)
        self.samples = self.dropped = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Batches from the current one on.

        Raises:
            ValueError: ``decode`` failed for more samples than ``max_dropped`` allows.
        """
        pieces = DataLoader(self._lanes, batch_size=None, num_workers=self._lanes.workers, collate_fn=_as_it_is, **self._loader)
        for piece in pieces:
            self._lanes.pieces[piece.lane] += 1
            self._lanes.turn = (piece.lane + 1) % len(self._lanes.pieces)
            self.samples, self.dropped = self.samples + piece.samples, self.dropped + piece.dropped
            if piece.dropped and self.dropped > self._max_dropped * max(self.samples, 1000):
                raise ValueError(
                    f"decode failed for {self.dropped} of {self.samples} samples, more than max_dropped={self._max_dropped} "
                    f"allows; the last time: {piece.error}"
                )
            if len(piece.index):
                yield piece.index, piece.batch

    def _cut(self) -> dict[str, Any]:
        lanes = self._lanes
        places = [lanes.places.start, lanes.places.step]
        return {"episode": lanes.episode.number, "batch_size": lanes.batch_size, "shuffle": lanes.shuffle, "places": places}

    def state_dict(self) -> dict[str, Any]:
        """How far each worker's lane is, and the sizes of the shards that were passed."""
        lanes = self._lanes
        position = {"pieces": list(lanes.pieces), "turn": lanes.turn, "sizes": lanes.sizes.clone()}
        return {**self._cut(), **position, "samples": self.samples, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was; raises ValueError if it is of another episode or share, or cut otherwise."""
        for name, own in {**self._cut(), "workers": len(self._lanes.pieces)}.items():
            kept = len(state["pieces"]) if name == "workers" else state[name]
            if kept != own:
                raise ValueError(f"state_dict has {name}={kept} but this pass has {name}={own}")
        self._lanes.pieces, self._lanes.turn = list(state["pieces"]), state["turn"]
        self._lanes.sizes.copy_(state["sizes"])
        self.samples, self.dropped = state["samples"], state["dropped"]


def _as_it_is(piece: Any) -> Any:
    return piece
