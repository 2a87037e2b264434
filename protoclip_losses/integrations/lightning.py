"""Lightning: a callback that makes each epoch an episode."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from .. import _checks as check
from ..distributed import active_group, gather_sizes, validate_on_all_ranks
from ..episodes import EpisodeOrder, extract
from ..heads import ProjectionHeads
from ..losses import ProtoLoss
from ..prototypes import EpisodicClusterer, Prototypes
from .teachers import Teacher, build_episode, check_rows

check.require("lightning.pytorch", "lightning")
from lightning.pytorch import Callback  # noqa: E402


class ProtoCLIPCallback(Callback):  # type: ignore[misc]
    """Extraction, clustering and back translation before the first batch of each epoch; clamps the scale after each batch.

    **Use it when:** a LightningModule trains with :class:`~protoclip_losses.ProtoLoss` and its data are read by sample index.
    **Not when:** no index reaches the loss: set :class:`~protoclip_losses.OnlinePrototypes`, and only the clamp remains.
    **Related:** :class:`~protoclip_losses.EpisodeOrder`, :func:`~protoclip_losses.extract`, ``examples/host_lightning.py``.

    The LightningModule holds a :class:`~protoclip_losses.ProtoLoss` as ``self.loss``, which saves the prototypes with the rest of
    the module, and has a method ``project(batch)`` that returns the sample indices (n,) and the projected image and text
    features (n, D), L2-normalised. Any :class:`~protoclip_losses.heads.ProjectionHeads` in it is clamped.

    Samples are those of the Trainer's one training DataLoader: the episode if its sampler is an
    :class:`~protoclip_losses.EpisodeOrder`, the samples of a ``SubsetRandomSampler``, else the whole data set. A fit begins
    without prototypes, whatever the loss held before; an epoch that is resumed in its middle keeps its own.

    If :class:`~protoclip_losses.OnlinePrototypes` are set, the module needs no ``project``, and its ``training_step`` calls the
    loss without an index, and with ``teacher_features`` of the batch where there is an external teacher.

    Args:
        num_prototypes: K; default one per 10 samples of an epoch, of all processes.
        warmup_epochs: first epochs without prototypes.
        clusterer: used instead of ``EpisodicClusterer(num_prototypes)``.
        teachers: external teachers by name; row i belongs to item i of the data set. A ``TeacherAdapter`` is clustered in
            each episode; a :class:`~protoclip_losses.Clustering` of all items, as ``EpisodicClusterer.fit_teacher`` returns, or
            a :class:`~protoclip_losses.KMeansResult` is not clustered again.

    Raises:
        TypeError: when the fit begins, a module without a loss or ``project``, or data that are not one DataLoader of a data set
            that is read by number.
        ValueError: likewise, a teacher with fewer rows than the data set, or one given here in online mode.
    """

    def __init__(
        self,
        num_prototypes: int | None = None,
        *,
        warmup_epochs: int = 1,
        clusterer: EpisodicClusterer | None = None,
        teachers: Mapping[str, Teacher] | None = None,
    ) -> None:
        self.num_prototypes, self.warmup_epochs, self.clusterer = num_prototypes, warmup_epochs, clusterer
        self.teachers = teachers or {}
        self.epoch = -1  # of the prototypes that are set
        self._previous = None if clusterer is None else clusterer.previous  # what the first fit begins with, and so each

    def state_dict(self) -> dict[str, int]:
        """The epoch of the prototypes in the loss."""
        return {"format": 1, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume with that epoch's prototypes, which are in the state of the loss."""
        check.state_format("ProtoCLIPCallback", state_dict)
        self.epoch = state_dict["epoch"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the module has a loss and a ``project``, and forget an earlier fit. A checkpoint is loaded after this."""
        loss = getattr(pl_module, "loss", None)
        if not isinstance(loss, ProtoLoss):
            raise TypeError(f"{type(pl_module).__name__}.loss must be a ProtoLoss, got {type(loss).__name__}")
        if not loss.needs_episodes:
            if self.teachers:
                raise ValueError(
                    f"teachers must be left out with OnlinePrototypes, got {', '.join(map(repr, self.teachers))}: call the loss "
                    "with teacher_features={name: teacher[index]} in training_step"
                )
            return
        if stage == "fit":
            if not callable(getattr(pl_module, "project", None)):
                raise TypeError(f"{type(pl_module).__name__} must have a method project(batch) that returns index, image, text")
            self.epoch = -1
            if self.clusterer is not None:
                self.clusterer.previous = self._previous
        if stage == "fit" or loss.prototypes is None:
            loss.set_prototypes(None)  # for what calls the loss before the first epoch: sanity checks, Tuner, validation alone

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the data before the first epoch; the clusterer of a resumed fit remembers the prototypes that were saved."""

        def check_data() -> None:
            last = trainer.max_epochs
            if pl_module.loss.needs_episodes and (last in (None, -1) or last > self.warmup_epochs):
                check_rows(self.teachers, len(_loader(trainer).dataset), "the data set")  # type: ignore[arg-type]

        # From here on ranks set prototypes together: which epoch has them is the same on all.
        validate_on_all_ranks(check_data, active_group(None), lambda: {"the epoch of the prototypes": self.epoch})
        if self.clusterer is not None and isinstance(pl_module.loss.prototypes, Prototypes):
            self.clusterer.previous = pl_module.loss.prototypes

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the epoch's prototypes if they are not: on_train_epoch_start is not always called in a resumed run."""
        if pl_module.loss.needs_episodes and self.epoch != trainer.current_epoch:
            self.epoch = trainer.current_epoch
            pl_module.loss.set_prototypes(None if self.epoch < self.warmup_epochs else self.build(trainer, pl_module))

    def build(self, trainer: Any, pl_module: Any) -> Prototypes:
        """Extract, cluster and back-translate the epoch's samples."""
        loader = _loader(trainer)
        batches: DataLoader[Any] = DataLoader(
            loader.dataset,
            _batch_size(loader),
            sampler=_own_samples(loader, trainer.global_rank, trainer.world_size),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
        )

        def project(batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return pl_module.project(trainer.strategy.batch_to_device(batch))

        bank = extract(pl_module, batches, project)
        number = self.num_prototypes or max(1, sum(gather_sizes(len(bank), active_group(None))) // 10)
        return build_episode(self.clusterer or EpisodicClusterer(number), bank, self.teachers, pl_module.loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Clamp the scale of the prototype terms as CLIP clamps its own."""
        for module in pl_module.modules():
            if isinstance(module, ProjectionHeads):
                module.clamp_scale()


def _loader(trainer: Any) -> "DataLoader[Any]":
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        got = (
            f"{len(loader)} in a {type(loader).__name__}" if isinstance(loader, (Mapping, list, tuple)) else type(loader).__name__
        )
        raise TypeError(f"the Trainer must have one training DataLoader, got {got}")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            f"the training data must have a length and be read by number, got {type(loader.dataset).__name__}: for a stream, set "
            "OnlinePrototypes in the loss"
        )
    return loader


def _own_samples(loader: "DataLoader[Any]", rank: int, world_size: int) -> Any:
    """This rank's samples of the epoch; those of all ranks are each sample once."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)  # with batch_sampler= the loader's own is not used
    given = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning spreads a sampler over the processes
    if isinstance(given, EpisodeOrder):
        return given if given.world_size == world_size else list(given)[rank::world_size]
    if isinstance(given, SubsetRandomSampler):
        return [int(i) for i in given.indices[rank::world_size]]
    return range(rank, len(loader.dataset), world_size)  # type: ignore[arg-type]


def _batch_size(loader: "DataLoader[Any]") -> int | None:
    """That of the loader; None if it makes no batches, as the data set's items are batches."""
    if loader.batch_size is not None or loader.batch_sampler is None:
        return loader.batch_size
    if size := getattr(loader.batch_sampler, "batch_size", None):
        return int(size)
    # On average.
    return -(-len(loader.dataset) // len(loader)) if hasattr(loader.batch_sampler, "__len__") else 64  # type: ignore[arg-type]
