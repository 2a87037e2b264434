"""transformers' ``Trainer`` with episodes and ProtoLoss."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ..._checks import require
from ...distributed import active_group, gather_sizes, validate_on_all_ranks
from ...episodes import EpisodeOrder, EpisodeSampler, extract
from ...losses import ProtoLoss
from ...prototypes import EpisodicClusterer, Prototypes
from ..teachers import Teacher, build_episode, check_rows, labels_or_features
from ..trainer_state import epoch_to_begin, load_state, save_state
from .data import CollateNumbered, NumberedData
from .model import add_heads, check_heads
from .state import check_checkpoint

require("transformers", "transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402


class ProtoCLIPTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` that trains a dual encoder with ProtoLoss.

    **Use it when:** you train a ``CLIPModel``, or another dual encoder, with ``Trainer`` on a data set with a length.
    **Not when:** the data set is a stream: write a loop with :class:`~protoclip_losses.StreamEpisodes`.
    **Related:** :class:`~protoclip_losses.ProtoLoss`, :func:`add_heads`, ``examples/host_transformers.py``.

    Each epoch is an episode: its samples are drawn without replacement, their features extracted, clustered and
    back-translated, and then trained on. Every argument of ``Trainer`` is accepted by name and means the same.

    If :class:`~protoclip_losses.OnlinePrototypes` are set in ``loss``, there is no extraction, and ``num_prototypes``,
    ``warmup_epochs`` and ``clusterer`` have no effect.

    Args:
        model: a dual encoder; it is given heads, see :func:`add_heads`, unless it has them. With ``model_init`` each model is,
            and prototypes and clustering start anew with it.
        args: ``TrainingArguments``.
        loss: the objective; default ``ProtoLoss()``.
        num_prototypes: K; default one per 10 samples of an episode.
        episode_size: samples per epoch; default the whole data set.
        warmup_epochs: first epochs without prototypes.
        clusterer: used instead of ``EpisodicClusterer(num_prototypes, seed=args.data_seed or args.seed)``.
        teachers: external teachers by name; row i belongs to item i of ``train_dataset``. A ``TeacherAdapter`` is clustered in
            each episode; a :class:`~protoclip_losses.Clustering` of all items, as ``EpisodicClusterer.fit_teacher`` returns, or
            a :class:`~protoclip_losses.KMeansResult` is not clustered again. Online mode takes a ``TeacherAdapter``.
        heads: arguments of :func:`add_heads`.
        train_dataset: items that the collator makes a mapping of batches of; None for evaluation alone.

    Raises:
        TypeError: a model that is no dual encoder, or is compiled or wrapped; a training set without a length.
        ValueError: a teacher with fewer rows than the training set; heads that PEFT keeps frozen.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        loss: ProtoLoss | None = None,
        num_prototypes: int | None = None,
        episode_size: int | None = None,
        warmup_epochs: int = 1,
        clusterer: EpisodicClusterer | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        heads: Mapping[str, Any] | None = None,
        train_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        self.loss, self.teachers, self.warmup_epochs = loss or ProtoLoss(), teachers or {}, warmup_epochs
        self.heads, self.is_restored, self._at_start = heads or {}, False, None
        if train_dataset is not None:
            if not hasattr(train_dataset, "__len__") or isinstance(train_dataset, IterableDataset):
                name = type(train_dataset).__name__
                raise TypeError(f"train_dataset must have a length and be read by number, got {name}")
            validate_on_all_ranks(lambda: check_rows(self.teachers, len(train_dataset), "train_dataset"), active_group(None))
            seed = args.seed if args.data_seed is None else args.data_seed
            self.order = EpisodeOrder(EpisodeSampler(len(train_dataset), episode_size or len(train_dataset), seed=seed))
            number = num_prototypes or max(1, len(self.order) // 10)
            self.clusterer = clusterer or EpisodicClusterer(number, seed=seed)
            train_dataset = NumberedData(train_dataset)
        super().__init__(None if model is None else self._with_heads(model), args, train_dataset=train_dataset, **trainer)
        self._at_start = self._memory() if self.model_init is not None else None
        self.loss_is_scaled_for_ga = False  # a mean over the batch: Trainer divides it by the number of accumulated batches
        self.add_callback(EpisodeCallback(self))

    @property
    def online(self) -> bool:
        """Whether the prototypes keep themselves up to date."""
        return not self.loss.needs_episodes

    def _with_heads(self, model: Any) -> Any:
        if not hasattr(model, "proto"):
            add_heads(model, **self.heads)
        check_heads(model)
        return model

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model with new heads. What the loss and the clusterer remember of the model before is forgotten."""
        model = self._with_heads(super().call_model_init(trial))
        if self._at_start is not None:
            state, previous = copy.deepcopy(self._at_start)
            self.loss.load_state_dict(state)
            if hasattr(self, "clusterer"):
                self.clusterer.previous = previous
        return model

    def _memory(self) -> Any:
        return copy.deepcopy((self.loss.state_dict(), self.clusterer.previous if hasattr(self, "clusterer") else None))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``Trainer.train``."""
        self.is_restored = False
        return super().train(*args, **kwargs)

    def start_epoch(self, number: int, is_resumed: bool) -> None:
        """Draw the episode and set its prototypes; those of a resumed epoch are the saved ones."""
        self.order.set_epoch(number)
        if self.online:
            return
        if number < self.warmup_epochs:
            self.loss.set_prototypes(None)
            return
        keeps = is_resumed and self.is_restored and self._has_prototypes_of(number)
        if not all(gather_sizes(int(keeps), active_group(None))):  # extraction and clustering are for all ranks or for none
            bank = extract(self.model, self._own_batches(number), self._project)
            self.loss.set_prototypes(build_episode(self.clusterer, bank, self.teachers, self.loss))

    def _has_prototypes_of(self, number: int) -> bool:
        # With another batch size, a resumed step may be in another epoch.
        held, drawn = self.loss.prototypes, self.order.episodes.episode(number).index
        return isinstance(held, Prototypes) and bool(torch.isin(held.index.cpu(), drawn).all())

    def _own_batches(self, number: int) -> DataLoader[Any]:
        own = EpisodeOrder(self.order.episodes, self.args.process_index, self.args.world_size)
        own.set_epoch(number)
        return DataLoader(
            self.train_dataset,
            self._train_batch_size,
            sampler=own,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def _project(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = dict(self._prepare_inputs(dict(batch)))
        index = batch.pop("index")
        with self.accelerator.autocast():
            out = self.model.features(**batch)
        return index, out["image_features_projected"], out["text_features_projected"]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """ProtoLoss in training; in evaluation the model's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        index = inputs["index"]
        outputs = model(**{name: x for name, x in inputs.items() if name != "index"})
        loss = self.loss(**outputs, **labels_or_features(self.loss, self.teachers, index))
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return CollateNumbered(super()._get_collator_with_removed_columns(data_collator, description))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and next to it the prototypes, so that an epoch can be resumed; in online mode each rank's queue."""
        super().save_model(output_dir, _internal_call)
        save_state(self.loss, output_dir or self.args.output_dir, self.args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            validate_on_all_ranks(lambda: check_checkpoint(checkpoint), active_group(None))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load = super()._load_from_checkpoint
        validate_on_all_ranks(lambda: load(resume_from_checkpoint, model), active_group(None))
        self.is_restored = load_state(self.loss, resume_from_checkpoint, self.args)
        if isinstance(self.loss.prototypes, Prototypes):
            self.clusterer.previous = self.loss.prototypes


class EpisodeCallback(TrainerCallback):  # type: ignore[misc]
    """Starts an episode at the beginning of each epoch and clamps the scale after each step."""

    def __init__(self, trainer: ProtoCLIPTrainer) -> None:
        self.trainer = trainer
        self.epoch, self.is_resumed = 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Count epochs from the one that Trainer begins with."""
        self.epoch, self.is_resumed = epoch_to_begin(args, state, others["train_dataloader"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start an episode, or resume an interrupted one."""
        self.trainer.start_epoch(self.epoch, self.is_resumed)
        self.epoch, self.is_resumed = self.epoch + 1, False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Clamp the scale of the prototype terms as CLIP clamps its own."""
        self.trainer.model.proto.clamp_scale()
