"""open_clip 3.3's training data with an index per sample, which its pipelines do not yield."""

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ..._checks import require
from ...episodes import WithIndex


class IndexedBatches:
    """A loader of (images, texts, index) that yields (images, texts), as open_clip's loop expects, and keeps the last indices."""

    def __init__(self, loader: Any, extraction: Any, like: Any, batches_per_step: int) -> None:
        self.loader, self.extraction = loader, extraction
        self.num_batches, self.num_samples = like.num_batches, like.num_samples
        self._recent: deque[Tensor] = deque(maxlen=batches_per_step)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, texts, index in self.loader:
            self._recent.append(index)
            yield images, texts

    def index(self) -> Tensor:
        """Sample indices of the batches of this step."""
        return torch.cat(tuple(self._recent))


def number_samples(info: Any, seed: int, batches_per_step: int) -> Any:
    """open_clip's training data with an index per sample: the row of a table, a hash of shard and key in WebDatasets."""
    data = require("open_clip_train.data", "open-clip")
    loader = info.dataloader
    if info.shared_epoch is None:
        table = WithIndex(loader.dataset)
        options = {"num_workers": loader.num_workers, "pin_memory": loader.pin_memory}
        training = DataLoader(table, batch_sampler=loader.batch_sampler, **options)
        # open_clip drops the last batch, and which samples are in it is known only after training has drawn them all.
        own = info.sampler if isinstance(info.sampler, DistributedSampler) else None
        extraction = DataLoader(table, batch_size=loader.batch_size, sampler=own, **options)
    else:
        training = extraction = loader
        wds = data.wds
        stages = loader.pipeline[0].dataset.pipeline
        names = [getattr(getattr(stage, "f", None), "__name__", "") for stage in stages]
        # Extraction and training must see the same samples of the epoch, and this stage is seeded by the clock.
        at = names.index("_shuffle")
        stages[at] = data.detshuffle2(**stages[at].kw, seed=seed, epoch=info.shared_epoch)
        at = names.index("_to_tuple")
        stages[at : at + 1] = [wds.map(_with_hash), wds.to_tuple("image", "text", "index")]
    batches = IndexedBatches(training, extraction, loader, batches_per_step)
    return data.DataInfo(batches, info.sampler, info.shared_epoch)


def _with_hash(sample: dict[str, Any]) -> dict[str, Any]:
    name = f"{sample['__url__']}/{sample['__key__']}"
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    return {**sample, "index": torch.tensor(number)}
