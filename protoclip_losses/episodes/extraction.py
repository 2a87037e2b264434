"""Between a host's data set and the prototypes of an episode: sample indices and a bank of features."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from ..distributed import active_group, broadcast
from .bank import FeatureBank
from .sampler import EpisodeSampler


class WithIndex(Dataset[Any]):
    """A map-style data set whose items carry their place in it: under ``"index"`` in a mapping, last in a tuple or list.

    Example:
        >>> from protoclip_losses.episodes.extraction import WithIndex
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


class EpisodeOrder(Sampler[int]):
    """The order in which an epoch sees its samples: those of the episode with the epoch's number, this rank's share of them.

    Hosts call :meth:`set_epoch` before each epoch. The order depends on nothing else, so that a resumed run keeps it.

    Example:
        >>> from protoclip_losses import EpisodeSampler
        >>> from protoclip_losses.episodes.extraction import EpisodeOrder
        >>> order = EpisodeOrder(EpisodeSampler(dataset_size=10, episode_size=4))
        >>> order.set_epoch(1)
        >>> list(order) == EpisodeSampler(10, 4).episode(1).index.tolist()
        True
    """

    def __init__(self, episodes: EpisodeSampler, rank: int = 0, world_size: int = 1) -> None:
        self.episodes, self.rank, self.world_size, self.epoch = episodes, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to this episode."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.episodes.episode_size, self.world_size))

    def __iter__(self) -> Iterator[int]:
        return iter(self.episodes.episode(self.epoch).shard(self.rank, self.world_size).tolist())


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
