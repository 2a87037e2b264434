"""Between a host's data set and the prototypes of an episode: sample indices and a bank of features."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from ..distributed import active_group, broadcast, gather_sizes, validate_on_all_ranks
from .bank import FeatureBank
from .sampler import EpisodeSampler, shard_slice


class WithIndex(Dataset[Any]):
    """A map-style data set whose items carry their index: under ``"index"`` in a mapping, last in a tuple.

    A mapping becomes a dict with ``"index"`` (which replaces a value of that name), a tuple or list a tuple with the index last.
    Any other item, such as a tensor, becomes the pair (item, index). None stays None, for a ``collate_fn`` that leaves broken
    samples out.

    **Use it when:** a loss, a bank or a teacher needs the sample index of a batch, and the data set does not give it.
    **Not when:** the data are shards that are read from their beginning: :meth:`StreamEpisode.batches` gives an index.
    **Related:** :class:`EpisodeOrder`, the sampler for the same ``DataLoader``; :func:`extract`.

    Args:
        dataset: has a length and is indexed by numbers from 0 on.

    Example:
        >>> from protoclip_losses import WithIndex
        >>> WithIndex([("cat.jpg", "a cat"), ("dog.jpg", "a dog")])[1]
        ('dog.jpg', 'a dog', 1)
        >>> WithIndex([{"image": "cat.jpg"}])[0]
        {'image': 'cat.jpg', 'index': 0}

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996: pseudo labels are looked up by sample.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __repr__(self) -> str:
        return f"WithIndex({type(self.dataset).__name__} of {len(self)} samples)"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if item is None:
            return None
        if isinstance(item, Mapping):
            return {**item, "index": index}
        return (*item, index) if isinstance(item, (tuple, list)) else (item, index)


class EpisodeOrder(Sampler[int]):
    """The torch sampler of episodes: an epoch's samples are those of the episode with its number, this rank's share of them.

    Hosts call :meth:`set_epoch` before each epoch. The order depends on nothing else, so that a resumed run keeps it.

    **Use it when:** a ``torch.utils.data.DataLoader`` should go through an episode in each epoch.
    **Not when:** you write the loop: ``for episode in EpisodeSampler(...)``.
    **Related:** :class:`EpisodeSampler`, which draws; :class:`WithIndex`, which tells the batch its samples.

    Args:
        episodes: which samples make an episode.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: a rank outside [0, world_size).

    Example:
        >>> from protoclip_losses import EpisodeOrder, EpisodeSampler
        >>> order = EpisodeOrder(EpisodeSampler(dataset_size=10, episode_size=4))
        >>> order.set_epoch(1)
        >>> list(order) == EpisodeSampler(10, 4).episode(1).index.tolist()
        True

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996; ``torch.utils.data.DistributedSampler``.
    """

    def __init__(self, episodes: EpisodeSampler, rank: int = 0, world_size: int = 1) -> None:
        shard_slice(rank, world_size)
        self.episodes, self.rank, self.world_size, self.epoch = episodes, rank, world_size, 0

    def __repr__(self) -> str:
        return f"EpisodeOrder({self.episodes}, rank={self.rank}, world_size={self.world_size}, epoch={self.epoch})"

    def set_epoch(self, epoch: int) -> None:
        """Take the samples of the episode with this number from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.episodes.episode_size, self.world_size))

    def __iter__(self) -> Iterator[int]:
        return iter(self.episodes.episode(self.epoch).shard(self.rank, self.world_size).tolist())


@torch.no_grad()
def extract(model: nn.Module, batches: Iterable[Any], project: Callable[[Any], tuple[Tensor, Tensor, Tensor]]) -> FeatureBank:
    """Projected features of this rank's samples, in eval mode and without gradient; training continues as if nothing had run.

    **Use it when:** an episode's features are those of one forward pass of ``model`` over a data loader.
    **Not when:** there are further modalities or teachers, or a stream: fill a :class:`FeatureBank` or
    :class:`FeatureCollector` in a loop of your own.
    **Related:** :class:`EpisodicClusterer` builds prototypes of the bank that is returned.

    Args:
        model: put into eval mode, and module by module back into the mode it was in. Under torch.distributed all ranks take
            the buffers of the first, as DDP does in training: BatchNorm statistics differ between ranks otherwise.
        batches: of this rank's samples. Extraction draws from no random generator that training uses.
        project: from a batch to the sample indices (n,), the image and the text features (n, D), L2-normalised.

    Returns:
        The complete bank, in float32 on the features' device; without rows on a rank that had no batch.

    Raises:
        ValueError: no batch on any rank; under torch.distributed also where another rank raised.

    Example:
        >>> model, images = torch.nn.Linear(4, 2), torch.randn(6, 4)
        >>> loader = torch.utils.data.DataLoader(WithIndex(images), batch_size=3)
        >>> def project(batch):
        ...     features = torch.nn.functional.normalize(model(batch[0]), dim=1)
        ...     return batch[1], features, features
        >>> extract(model, loader, project)
        FeatureBank(6 samples, dim=2, modalities=['image', 'text'], missing=0, torch.float32 on cpu)

    Source:
        ProtoCLIP section III-D, https://arxiv.org/abs/2206.10996: features of an episode, extracted before its training.
    """
    group = active_group(None)
    buffers = dict(model.named_buffers())
    kinds = {"the buffers of the model": [(name, x.shape, x.dtype) for name, x in buffers.items()]}
    validate_on_all_ranks(lambda: None, group, signature=lambda: kinds)
    if group is not None:
        for buffer in buffers.values():
            buffer.copy_(broadcast(buffer, group))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
            parts = validate_on_all_ranks(lambda: [project(batch) for batch in batches], group)
    finally:
        for module, training in modes:
            module.training = training
    widths = gather_sizes(parts[0][1].shape[1] if parts else 0, group)
    if not parts:
        if not any(widths):
            raise ValueError("batches must hold at least one batch, got none")
        return FeatureBank(torch.zeros(0, dtype=torch.int64, device="cpu"), max(widths))
    index, image, text = (torch.cat(column) for column in zip(*parts, strict=True))
    return FeatureBank.from_features(index.to(image.device), image.float(), text.float())
