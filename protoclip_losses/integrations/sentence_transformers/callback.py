"""Episodes for ``SentenceTransformerTrainer``, and the state of the loss in its checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..._checks import require
from ...distributed import RankRows, active_group, gather_sizes, validate_on_all_ranks
from ...episodes import extract
from ...prototypes import EpisodicClusterer, Prototypes
from ..teachers import build_episode, check_rows
from ..trainer_state import epoch_to_begin, load_state, save_state
from .loss import INDEX, ProtoCLIPLoss, checked_index, unwrapped

for module in ("sentence_transformers", "datasets", "accelerate"):
    require(module, "sentence-transformers")
from accelerate.utils import send_to_device  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformerTrainer  # noqa: E402
from transformers import TrainerCallback, TrainerState  # noqa: E402

HEADS = "proto_heads.pt"


class ProtoCLIPCallback(TrainerCallback):  # type: ignore[misc]
    """Makes each epoch an episode, and saves and resumes what belongs to :class:`ProtoCLIPLoss` with the trainer's checkpoints.

    **Use it when:** you train with :class:`ProtoCLIPLoss`, in online mode too, where it only saves and resumes.
    **Not when:** you neither need an episode's prototypes nor resume: the loss works without it.
    **Related:** :class:`~protoclip_losses.EpisodicClusterer`, ``examples/host_sentence_transformers.py``.

    Before the first batch of an epoch it extracts the features of the training set in eval mode, clusters them and sets the
    prototypes in the loss. A run begins without prototypes unless it resumes.

    Args:
        loss: the loss of the trainer. A ``TeacherAdapter`` among its teachers is clustered in each episode; a
            :class:`~protoclip_losses.Clustering` of all samples, as ``EpisodicClusterer.fit_teacher`` returns, or a
            :class:`~protoclip_losses.KMeansResult` is not clustered again. Online mode takes a ``TeacherAdapter``.
        num_prototypes: K; default one per 10 samples.
        warmup_epochs: first epochs without prototypes.
        clusterer: used instead of ``EpisodicClusterer(num_prototypes, seed=args.data_seed or args.seed)``.
        resume_from: the folder of the checkpoint, needed only if the trainer resumes one that is not in its ``output_dir``: it
            does not tell callbacks which.

    Raises:
        TypeError: when training begins, a training set that is not one ``datasets.Dataset``; labels that are not integers.
        ValueError: likewise, another model in the loss than in the trainer; no labels, or labels that several samples share; a
            teacher with fewer rows than the training set; a checkpoint that cannot be found or was saved without this callback.
    """

    def __init__(
        self,
        loss: ProtoCLIPLoss,
        num_prototypes: int | None = None,
        *,
        warmup_epochs: int = 1,
        clusterer: EpisodicClusterer | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        if not isinstance(loss, ProtoCLIPLoss):
            raise TypeError(f"loss must be a ProtoCLIPLoss, got {type(loss).__name__}")
        self.loss, self.num_prototypes, self.warmup_epochs = loss, num_prototypes, warmup_epochs
        self.clusterer, self.resume_from = clusterer, resume_from
        self._previous = None if clusterer is None else clusterer.previous
        self.epoch, self.is_resumed, self.is_restored = 0, False, False

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, train_dataloader: Any, **others: Any) -> None:
        """Check the data and join the processes; load what was saved if this run resumes."""
        objective = self.loss.loss
        # A callback is asked before the first batch: an error now costs no epoch of warm-up.
        validate_on_all_ranks(lambda: self._check(args, model, train_dataloader), active_group(None))
        self.loss.join()
        if objective.needs_episodes and self.clusterer is None:
            number = self.num_prototypes or max(1, len(train_dataloader.dataset) // 10)
            self.clusterer = EpisodicClusterer(number, seed=args.seed if args.data_seed is None else args.data_seed)
        if self.clusterer is not None:
            self.clusterer.previous = self._previous
        self.epoch, self.is_resumed = epoch_to_begin(args, state, train_dataloader)
        self.is_restored = state.global_step > 0 and self._load(args, state)
        if objective.needs_episodes and not self.is_restored:
            objective.set_prototypes(None)

    def _check(self, args: Any, model: Any, loader: Any) -> None:
        if unwrapped(self.loss.model) is not unwrapped(model):
            raise ValueError("loss must be made with the model of the trainer, got one with another model")
        if not self.loss.loss.needs_episodes:
            return
        data = loader.dataset
        if not isinstance(data, Dataset):
            raise TypeError(
                f"train_dataset must be one datasets.Dataset, got {type(data).__name__}: for a stream, or for several, set "
                "OnlinePrototypes in the loss"
            )
        columns, labels = _columns(loader.collate_fn([data[0]]))
        if labels is None:
            raise ValueError(f"train_dataset must have {INDEX}, got {data.column_names}")
        checked_index(labels)
        if len(columns) != 2:
            raise ValueError(f"train_dataset must have two columns of inputs, image and text, got {data.column_names}")
        check_rows(self.loss.teachers, len(data), "train_dataset")

    def _load(self, args: Any, state: Any) -> bool:
        given = args.resume_from_checkpoint
        folder = Path(self.resume_from or (given if isinstance(given, str) else _folder(args, state)))

        def read() -> dict[str, Tensor]:
            if not _is_of(folder, state):
                raise ValueError(
                    f"resume_from must be the checkpoint that the trainer resumes, of step {state.global_step}, got {folder}: "
                    "ProtoCLIPCallback(loss, resume_from=...)"
                )
            if not (folder / HEADS).exists():
                raise ValueError(f"{folder} must be a checkpoint that ProtoCLIPCallback was there to save, got none of its files")
            saved: dict[str, Tensor] = torch.load(folder / HEADS, map_location="cpu", weights_only=True)
            return saved

        self.loss.heads.load_state_dict(validate_on_all_ranks(read, active_group(None)))
        is_restored = load_state(self.loss.loss, folder, args)
        if self.clusterer is not None and isinstance(self.loss.loss.prototypes, Prototypes):
            self.clusterer.previous = self.loss.loss.prototypes
        return is_restored

    def on_epoch_begin(self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any) -> None:
        """Set the epoch's prototypes; those of an epoch that is resumed in its middle are the saved ones."""
        objective, epoch, keeps = self.loss.loss, self.epoch, self.is_resumed and self.is_restored
        self.epoch, self.is_resumed = epoch + 1, False
        if not objective.needs_episodes:
            return
        if epoch < self.warmup_epochs:
            objective.set_prototypes(None)
        elif not all(gather_sizes(int(keeps and isinstance(objective.prototypes, Prototypes)), active_group(None))):
            objective.set_prototypes(self._build(args, train_dataloader))

    def _build(self, args: Any, loader: Any) -> Prototypes:
        data = loader.dataset
        assert self.clusterer is not None
        batches: DataLoader[Any] = DataLoader(
            data,
            args.train_batch_size,
            sampler=range(args.process_index, len(data), args.world_size),
            collate_fn=loader.collate_fn,
            num_workers=args.dataloader_num_workers,
        )

        def project(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            columns, labels = _columns(send_to_device(batch, args.device))
            return checked_index(labels), *self.loss.project(columns)

        bank, group = extract(self.loss, batches, project), active_group(None)
        index = RankRows(group, gather_sizes(len(bank), group)).gather(bank.index)
        if (distinct := len(torch.unique(index))) < len(index):
            raise ValueError(f"labels must tell {len(index)} samples apart, got {distinct} values: use {INDEX}")
        return build_episode(self.clusterer, bank, self.loss.teachers, self.loss.loss)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the heads and the prototypes into the checkpoint; in online mode each process its own queue."""
        if state.is_hyper_param_search:  # whose trials have folders of their own and are not resumed
            return
        folder = _folder(args, state)
        if args.should_save:
            torch.save(self.loss.heads.state_dict(), folder / HEADS)
        save_state(self.loss.loss, folder, args)


def _columns(batch: Any) -> tuple[list[dict[str, Any]], Tensor | None]:
    """The two arguments of a loss, from a batch of the collator, as the trainer makes them."""
    columns, labels = SentenceTransformerTrainer.collect_features(None, batch)
    return columns, labels


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_of(folder: Path, state: Any) -> bool:
    """Whether a checkpoint is where a trainer with this state comes from."""
    if not (file := folder / "trainer_state.json").exists():
        return False
    saved = TrainerState.load_from_json(str(file))
    return all(getattr(saved, name) == getattr(state, name) for name in ("global_step", "epoch", "total_flos", "log_history"))
