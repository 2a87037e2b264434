"""Lightning: a callback that makes each epoch an episode."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from .. import _checks as check
from ..episodes import EpisodeOrder, extract
from ..heads import ProjectionHeads
from ..losses import ProtoLoss
from ..prototypes import EpisodicClusterer, Prototypes
from ..teachers import TeacherAdapter

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

    Samples are those of the Trainer's training DataLoader: the episode if its sampler is an
    :class:`~protoclip_losses.EpisodeOrder`, else the whole data set. An epoch that is resumed in its middle keeps its prototypes.

    If :class:`~protoclip_losses.OnlinePrototypes` are set, the module needs no ``project``, and its ``training_step`` calls the
    loss without an index.

    Args:
        num_prototypes: K; default one per 10 samples of an epoch.
        warmup_epochs: first epochs without prototypes.
        clusterer: used instead of ``EpisodicClusterer(num_prototypes)``.
        teachers: external teachers by name; row i belongs to item i of the data set.
    """

    def __init__(
        self,
        num_prototypes: int | None = None,
        *,
        warmup_epochs: int = 1,
        clusterer: EpisodicClusterer | None = None,
        teachers: Mapping[str, TeacherAdapter] | None = None,
    ) -> None:
        self.num_prototypes, self.warmup_epochs, self.clusterer = num_prototypes, warmup_epochs, clusterer
        self.teachers = teachers or {}
        self.epoch = -1  # of the prototypes that are set

    def state_dict(self) -> dict[str, int]:
        """The epoch of the prototypes in the loss."""
        return {"format": 1, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume with that epoch's prototypes, which are in the state of the loss."""
        check.state_format("ProtoCLIPCallback", state_dict)
        self.epoch = state_dict["epoch"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check, before anything runs, that the module has a loss and, for episodes, a ``project``."""
        if not isinstance(getattr(pl_module, "loss", None), ProtoLoss):
            raise TypeError(
                f"{type(pl_module).__name__}.loss must be a ProtoLoss, got {type(getattr(pl_module, 'loss', None)).__name__}"
            )
        if pl_module.loss.needs_episodes and not callable(getattr(pl_module, "project", None)):
            raise TypeError(f"{type(pl_module).__name__} must have a method project(batch) that returns index, image, text")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the epoch's prototypes if they are not: on_train_epoch_start is not always called in a resumed run."""
        if pl_module.loss.needs_episodes and self.epoch != trainer.current_epoch:
            self.epoch = trainer.current_epoch
            pl_module.loss.set_prototypes(None if self.epoch < self.warmup_epochs else self.build(trainer, pl_module))

    def build(self, trainer: Any, pl_module: Any) -> Prototypes:
        """Extract, cluster and back-translate the epoch's samples."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise TypeError(f"the Trainer must have one training DataLoader, got {type(loader).__name__}")
        whole = range(trainer.global_rank, len(loader.dataset), trainer.world_size)  # type: ignore[arg-type]
        own = loader.sampler if isinstance(loader.sampler, EpisodeOrder) else whole
        batches: DataLoader[Any] = DataLoader(
            loader.dataset, loader.batch_size, sampler=own, collate_fn=loader.collate_fn, num_workers=loader.num_workers
        )

        def project(batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return pl_module.project(trainer.strategy.batch_to_device(batch))

        bank = extract(pl_module, batches, project)
        number = self.num_prototypes or max(1, len(bank.index) * trainer.world_size // 10)
        return (self.clusterer or EpisodicClusterer(number)).build(bank, self.teachers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Clamp the scale of the prototype terms as CLIP clamps its own."""
        for module in pl_module.modules():
            if isinstance(module, ProjectionHeads):
                module.clamp_scale()
