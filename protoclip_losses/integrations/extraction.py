"""Between a host's data set and the prototypes of an episode: sample indices and a bank of features."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..distributed import active_group, broadcast
from ..episodes import FeatureBank


class WithIndex(Dataset[Any]):
    """A map-style data set whose items carry their place in it: under ``"index"`` in a mapping, last in a tuple or list.

    Example:
        >>> WithIndex([("cat.jpg", "a cat"), ("dog.jpg", "a dog")])[1]
        ('dog.jpg', 'a dog', 1)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        item = self.dataset[number]
        return (*item, number) if isinstance(item, (tuple, list)) else {**item, "index": number}


def in_order(loader: Any, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
    """A loader of the same data set and batch size that gives every ``world_size``-th sample once and drops none."""
    shard = range(rank, len(loader.dataset), world_size)
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=shard,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


@torch.no_grad()
def extract(model: nn.Module, batches: Iterable[Any], project: Callable[[Any], tuple[Tensor, Tensor, Tensor]]) -> FeatureBank:
    """Projected features of this rank's samples, in eval mode and without gradient; training goes on as if nothing had run.

    Args:
        model: put into eval mode, and module by module back into the mode it was in. Under torch.distributed all ranks take
            the buffers of the first, as DDP does in training: BatchNorm statistics differ between ranks otherwise.
        batches: of this rank's samples. Extraction draws from no random generator that training uses.
        project: from a batch to the sample indices (n,), the image and the text features (n, D), L2-normalised.
    """
    group = active_group(None)
    if group is not None:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer, group))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
            parts = [project(batch) for batch in batches]
    finally:
        for module, training in modes:
            module.training = training
    index, image, text = (torch.cat(column) for column in zip(*parts, strict=True))
    bank = FeatureBank(index.to(image.device), image.shape[1])
    bank.update(bank.index, image.float(), text.float())
    return bank
