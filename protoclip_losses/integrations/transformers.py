"""Hugging Face transformers: a ``Trainer`` that trains a ``CLIPModel`` with ProtoLoss. An epoch is an episode."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .._checks import require
from ..episodes import EpisodeOrder, EpisodeSampler, WithIndex, extract
from ..heads import ProjectionHeads, mix_in
from ..losses import ProtoLoss
from ..prototypes import EpisodicClusterer
from ..teachers import TeacherAdapter

require("transformers", "transformers")
from transformers import CLIPModel, Trainer, TrainerCallback  # noqa: E402

STATE_FILE = "proto_loss.pt"


class _Projected:
    """A mixin before CLIPModel: in training, forward returns the arguments of ProtoLoss and builds no logits."""

    def features(self: Any, pixel_values: Any, input_ids: Any, attention_mask: Any, position_ids: Any) -> dict[str, Tensor]:
        image = self.get_image_features(pixel_values).pooler_output
        text = self.get_text_features(input_ids, attention_mask, position_ids).pooler_output
        unit = {"image_features": F.normalize(image, dim=-1), "text_features": F.normalize(text, dim=-1)}
        return {**unit, "logit_scale": self.logit_scale.exp(), **self.proto(image, text)}

    # Trainer drops the columns that are not named here, so `index` has to be.
    def forward(
        self: Any,
        input_ids: Any = None,
        pixel_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        index: Any = None,
        **others: Any,
    ) -> Any:
        if self.training:
            return self.features(pixel_values, input_ids, attention_mask, position_ids)
        return super().forward(input_ids, pixel_values, attention_mask, position_ids, **others)  # type: ignore[misc]


def add_heads(model: Any, dim: int = 128, hidden_dim: int = 2048, norm: str = "batch") -> Any:
    """Give a ``CLIPModel`` :class:`~protoclip_losses.heads.ProjectionHeads` as ``model.proto``.

    In training mode its forward then returns the arguments of :class:`~protoclip_losses.ProtoLoss`, in eval mode the usual
    output. The model stays an instance of its class; its ``state_dict()`` gains the entries under ``proto``.
    """
    if not isinstance(model, CLIPModel):
        raise TypeError(f"model must be a CLIPModel, got {type(model).__name__}")
    model.proto = ProjectionHeads(model.config.projection_dim, dim, hidden_dim, norm).to(model.device)
    mix_in(model, _Projected)
    return model


class ProtoCLIPTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` that trains a ``CLIPModel`` with ProtoLoss.

    **Use it when:** you train or fine-tune a ``CLIPModel`` with ``Trainer`` on a data set with a length.
    **Not when:** the data set is a stream: write a loop with :class:`~protoclip_losses.StreamEpisodes`.
    **Related:** :class:`~protoclip_losses.ProtoLoss`, :func:`add_heads`, ``examples/host_transformers.py``.

    Each epoch is an episode: its samples are drawn without replacement, their features extracted, clustered and
    back-translated, and then trained on. Every argument of ``Trainer`` is accepted by name and means the same.

    If :class:`~protoclip_losses.OnlinePrototypes` are set in ``loss``, there is no extraction, and ``num_prototypes``,
    ``warmup_epochs`` and ``clusterer`` have no effect.

    Args:
        model: a ``CLIPModel``; it is given heads, see :func:`add_heads`, unless it has them.
        args: ``TrainingArguments``.
        loss: the objective; default ``ProtoLoss()``.
        num_prototypes: K; default one per 10 samples of an episode.
        episode_size: samples per epoch; default the whole data set.
        warmup_epochs: first epochs without prototypes.
        clusterer: used instead of ``EpisodicClusterer(num_prototypes, seed=args.data_seed or args.seed)``.
        teachers: external teachers by name; row i belongs to item i of ``train_dataset``.
        heads: arguments of :func:`add_heads`.

    Raises:
        TypeError: a model of another class; a training set without a length.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        loss: ProtoLoss | None = None,
        num_prototypes: int | None = None,
        episode_size: int | None = None,
        warmup_epochs: int = 1,
        clusterer: EpisodicClusterer | None = None,
        teachers: Mapping[str, TeacherAdapter] | None = None,
        heads: Mapping[str, Any] | None = None,
        train_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        if not hasattr(train_dataset, "__len__"):
            raise TypeError(f"train_dataset must have a length and be read by number, got {type(train_dataset).__name__}")
        seed = args.seed if args.data_seed is None else args.data_seed
        self.order = EpisodeOrder(EpisodeSampler(len(train_dataset), episode_size or len(train_dataset), seed=seed))
        number = num_prototypes or max(1, len(self.order) // 10)
        self.clusterer = clusterer or EpisodicClusterer(number, seed=seed)
        self.loss, self.teachers, self.warmup_epochs = loss or ProtoLoss(), teachers or {}, warmup_epochs
        self.online, self.is_restored = not self.loss.needs_episodes, False
        if not hasattr(model, "proto"):
            add_heads(model, **(heads or {}))
        super().__init__(model, args, train_dataset=WithIndex(train_dataset), **trainer)
        self.data_collator: Any = _CollateIndex(self.data_collator)
        self.loss_is_scaled_for_ga = False  # a mean over the batch: Trainer divides it by the number of accumulated batches
        self.add_callback(EpisodeCallback(self))

    def start_epoch(self, number: int, is_resumed: bool) -> None:
        """Draw the episode and set its prototypes; those of a resumed epoch are the saved ones."""
        self.order.set_epoch(number)
        if self.online:
            return
        if number < self.warmup_epochs:
            self.loss.set_prototypes(None)
        elif not (is_resumed and self.is_restored):
            own = EpisodeOrder(self.order.episodes, self.args.process_index, self.args.world_size)
            own.set_epoch(number)
            collate = self._get_collator_with_removed_columns(self.data_collator)
            workers = self.args.dataloader_num_workers
            batches = DataLoader(self.train_dataset, self._train_batch_size, sampler=own, collate_fn=collate, num_workers=workers)
            self.loss.set_prototypes(self.clusterer.build(extract(self.model, batches, self._project), self.teachers))

    def _project(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = self._prepare_inputs(dict(batch))
        inputs = (batch.get(name) for name in ("pixel_values", "input_ids", "attention_mask", "position_ids"))
        with self.compute_loss_context_manager():
            out = self.model.features(*inputs)
        return batch["index"], out["image_features_projected"], out["text_features_projected"]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """ProtoLoss in training; in evaluation the model's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        index, outputs = inputs["index"], model(**inputs)
        labels = {"index": index}
        if self.online:
            labels = {"teacher_features": {name: x[index.cpu()].to(index.device) for name, x in self.teachers.items()}}
        loss = self.loss(**outputs, **labels)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and next to it the prototypes, so that an epoch can be resumed; in online mode each rank's queue."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save or self.online:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.loss.state_dict(), folder / self._state_file())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / self._state_file()
        if file.exists():  # a checkpoint of a plain Trainer has none
            self.loss.load_state_dict(torch.load(file, weights_only=True))
            self.is_restored = True

    def _state_file(self) -> str:
        return f"proto_loss_{self.args.process_index}_of_{self.args.world_size}.pt" if self.online else STATE_FILE


class EpisodeCallback(TrainerCallback):  # type: ignore[misc]
    """Starts an episode at the beginning of each epoch and clamps the scale after each step."""

    def __init__(self, trainer: ProtoCLIPTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start an episode, or resume an interrupted one."""
        self.trainer.start_epoch(int(state.epoch), is_resumed=state.epoch % 1 > 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Clamp the scale of the prototype terms as CLIP clamps its own."""
        self.trainer.model.proto.clamp_scale()


class _CollateIndex:
    """Passes the sample indices around a collator, which may not know them."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        if "index" not in items[0]:  # evaluation
            return self.collate(items)
        index = torch.tensor([item["index"] for item in items])
        batch = self.collate([{name: x for name, x in item.items() if name != "index"} for item in items])
        return {**batch, "index": index}
