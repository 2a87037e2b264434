"""How shards are read: by loader workers, numbered, shuffled, decoded and batched, from any position on."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .. import _checks as check
from ..teachers.cache_record import strings_digest
from .sampler import permutation, saved_count

SAMPLES_PER_SHARD = 2**32  # sample indices reserved for a shard: more than any file has samples
NAMES_OF_0_6 = {
    "shuffle": "shuffle_buffer",
    "places": "shard_ids",
    "pieces": "batches_read",
    "turn": "next_worker",
    "sizes": "shard_sizes",
}


@dataclass
class WorkerBatch:
    """``batch_size`` consecutive samples of a worker, less those that were left out."""

    worker: int
    samples: int
    dropped: int
    index: Tensor
    batch: Any
    error: str


@dataclass(eq=False)
class ShardReader(IterableDataset[WorkerBatch]):
    """The data set that each loader worker iterates: worker w reads every ``num_workers``-th of the rank's shards, from w on.

    The loader takes a batch of each worker in turn. Worker numbers here are those of the first start: after a resume, torch's
    worker 0 continues the one that is next.
    """

    shards: tuple[str, ...]
    number: int  # of the episode
    seed: int
    read: Callable[[str], Iterable[Any]]
    decode: Callable[[Any], Any]
    batch_size: int
    shard_ids: range  # positions of this rank's shards in the episode
    shuffle_buffer: int
    only: Tensor | None
    collate_fn: Callable[[list[Any]], Any]
    num_workers: int

    def __post_init__(self) -> None:
        # Samples of each shard, -1 until it was read to its end. Shared: the one worker that reads a shard writes its size.
        self.shard_sizes = torch.full((len(self.shards),), -1, dtype=torch.int64, device="cpu")
        self.shard_sizes.share_memory_()  # type: ignore[no-untyped-call]
        self.batches_read = [0] * max(1, self.num_workers)  # by each worker
        self.next_worker = 0

    def __iter__(self) -> Iterator[WorkerBatch]:
        info = get_worker_info()
        worker = (self.next_worker + (0 if info is None else info.id)) % len(self.batches_read)
        samples = self._shuffled(worker, self.batches_read[worker] * self.batch_size)
        while part := list(islice(samples, self.batch_size)):
            yield self._decoded(worker, part)

    def _decoded(self, worker: int, part: list[tuple[int, Any]]) -> WorkerBatch:
        index, decoded, dropped, error = [], [], 0, ""
        for sample, raw in part:
            if self.only is not None and not _contains(self.only, sample):
                continue
            try:
                decoded.append(self.decode(raw))
                index.append(sample)
            except Exception as problem:  # whatever a decoder raises on broken bytes
                dropped += 1
                shard_id, row = divmod(sample, SAMPLES_PER_SHARD)
                what = traceback.format_exception_only(problem)[-1].strip()
                error = f"{what} (sample {row} of {self.shards[shard_id]})"
        batch = self.collate_fn(decoded) if decoded else None
        return WorkerBatch(worker, len(part), dropped, torch.tensor(index, dtype=torch.int64, device="cpu"), batch, error)

    def _shuffled(self, worker: int, skip: int) -> Iterator[tuple[int, Any]]:
        """The worker's samples from its ``skip``-th on, each block of ``shuffle_buffer`` in an order of its own."""
        block_number = skip // self.shuffle_buffer
        samples = self._numbered(worker, block_number * self.shuffle_buffer)
        skip %= self.shuffle_buffer
        while block := list(islice(samples, self.shuffle_buffer)):
            order = permutation(len(block), self.seed, self.number, self.shard_ids[worker], block_number)
            yield from (block[i] for i in order[skip:].tolist())
            block_number, skip = block_number + 1, 0

    def _numbered(self, worker: int, skip: int) -> Iterator[tuple[int, Any]]:
        """The worker's raw samples and their indices, from its ``skip``-th on; shards that end before it are not opened."""
        for shard_id in self.shard_ids[worker :: len(self.batches_read)]:
            if 0 <= (size := int(self.shard_sizes[shard_id])) <= skip:
                skip -= size
                continue
            size = 0
            for raw in self.read(self.shards[shard_id]):
                if size >= skip:
                    yield shard_id * SAMPLES_PER_SHARD + size, raw
                size += 1
            self.shard_sizes[shard_id] = size
            skip = max(0, skip - size)


def _contains(ordered: Tensor, sample: int) -> bool:
    position = int(torch.searchsorted(ordered, sample))
    return position < len(ordered) and int(ordered[position]) == sample


class StreamPass:
    """An iterable of batches ``(index, batch)`` that knows how far it is. Made by :meth:`StreamEpisode.batches`.

    Its ``state_dict()``, taken between two batches, lets a new process continue with the next one, in the same order and with
    the same indices, with the same number of workers. Shards that were read to their end are not opened again.

    **Use it when:** you loop over an episode of a stream; save its state to resume in the middle of a pass.
    **Not when:** the data set has a length: a ``DataLoader`` with :class:`EpisodeOrder` reads that.
    **Related:** :func:`~protoclip_losses.distributed.even_batches` gives every rank the same number of batches.

    Attributes:
        samples: read by this rank so far, in this pass.
        dropped: those of them that ``decode`` failed for.
    """

    def __init__(self, reader: ShardReader, max_dropped: float, loader: Mapping[str, Any]) -> None:
        self._reader, self._max_dropped, self._loader = reader, max_dropped, dict(loader)
        self.samples = self.dropped = 0

    def __repr__(self) -> str:
        reader = self._reader
        return (
            f"StreamPass(episode {reader.number}, {len(reader.shard_ids)} of {len(reader.shards)} shards, "
            f"batch_size={reader.batch_size}, num_workers={reader.num_workers}, shuffle_buffer={reader.shuffle_buffer}, "
            f"samples={self.samples}, dropped={self.dropped})"
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Batches from the current one on.

        Raises:
            ValueError: ``decode`` failed for more samples than ``max_dropped`` allows.
        """
        reader = self._reader
        loader = DataLoader(reader, batch_size=None, num_workers=reader.num_workers, collate_fn=_unchanged, **self._loader)
        with torch.device("cpu"):  # it draws a seed, which fails under a default device of meta
            batches = iter(loader)
        for part in batches:
            reader.batches_read[part.worker] += 1
            reader.next_worker = (part.worker + 1) % len(reader.batches_read)
            self.samples, self.dropped = self.samples + part.samples, self.dropped + part.dropped
            if part.dropped and self.dropped > self._max_dropped * max(self.samples, 1000):
                raise ValueError(
                    f"decode failed for {self.dropped} of {self.samples} samples, more than max_dropped={self._max_dropped} "
                    f"allows; the last time: {part.error}"
                )
            if len(part.index):
                yield part.index, part.batch

    def _settings(self) -> dict[str, Any]:
        reader = self._reader
        return {
            "episode": reader.number,
            "seed": reader.seed,
            "shards": strings_digest(reader.shards),
            "batch_size": reader.batch_size,
            "shuffle_buffer": reader.shuffle_buffer,
            "shard_ids": [reader.shard_ids.start, reader.shard_ids.step],
            "num_workers": len(reader.batches_read),
        }

    def state_dict(self) -> dict[str, Any]:
        """How far each worker is, the sizes of the shards that were read to their end, and what the pass was made with."""
        reader = self._reader
        position = {"batches_read": list(reader.batches_read), "next_worker": reader.next_worker}
        position |= {"shard_sizes": reader.shard_sizes.clone(), "samples": self.samples, "dropped": self.dropped}
        return {"format": 1, **self._settings(), **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which ``state`` was taken.

        Raises:
            ValueError: a state of another episode, seed, share or setting, of other shards, or with entries that do not fit.
        """
        owner, settings, workers = "StreamPass", self._settings(), len(self._reader.batches_read)
        if check.state_format(owner, state) == 0:
            state = {NAMES_OF_0_6.get(name, name): value for name, value in state.items()}
            state["num_workers"] = len(state.get("batches_read", ()))
            del settings["seed"], settings["shards"]  # which 0.6 did not save
        check.state_matches(owner, state, settings)
        next_worker, samples, dropped = (saved_count(owner, state, name) for name in ("next_worker", "samples", "dropped"))
        check.state_has(owner, state, ("batches_read", "shard_sizes"))
        batches_read, sizes = state["batches_read"], state["shard_sizes"]
        if not isinstance(batches_read, list) or len(batches_read) != workers or next_worker >= workers:
            raise ValueError(
                f"state_dict of {owner} must have a number of batches for each of {workers} workers as 'batches_read' and one of "
                f"them as 'next_worker', got {batches_read!r} and {next_worker}"
            )
        check.integers("state_dict['shard_sizes']", sizes, length=len(self._reader.shards), of=" as the episode has shards")
        self._reader.batches_read, self._reader.next_worker = list(batches_read), next_worker
        self._reader.shard_sizes.copy_(sizes)
        self.samples, self.dropped = samples, dropped


def _unchanged(batch: Any) -> Any:
    return batch
