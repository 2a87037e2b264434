"""A ``CLIPModel`` of a few thousand weights and a Trainer for it, on pictures without content."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, TrainingArguments

from protoclip_losses import OnlinePrototypes, ProtoLoss
from protoclip_losses.integrations.transformers import ProtoCLIPTrainer

from .objects import call, fractions, stacked, terms_of

PAIRS = [
    {"pixel_values": fractions(3, 64, 300 * i).reshape(3, 8, 8), "input_ids": torch.tensor([1 + i, 1 + i // 2, 2, 0])}
    for i in range(8)
]


def small_model() -> CLIPModel:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=8))


def trainer(folder: Path, online: bool, **options: Any) -> Any:
    """Two epochs of two steps; a checkpoint after the third."""
    loss = ProtoLoss(target_temperature=0.5)
    if online:
        loss.set_prototypes(OnlinePrototypes(2, queue_size=8, every=2, warmup=1))
    fixed = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 3, "report_to": "none", "use_cpu": True}
    return ProtoCLIPTrainer(
        model=small_model(),
        args=TrainingArguments(output_dir=str(folder), **fixed),
        train_dataset=PAIRS,
        loss=loss,
        num_prototypes=2,
        heads={"dim": 3, "hidden_dim": 4, "norm": "layer"},
        **options,
    )


def facts(loss: ProtoLoss) -> dict[str, Any]:
    """The prototypes; the loss of a batch, or of three in turn in online mode."""
    held = {name: x.clone() for name, x in terms_of(loss.prototypes).items()}
    if isinstance(loss.prototypes, OnlinePrototypes):
        return {**held, **stacked([call(loss, 100 * number) for number in range(3)])}
    return {**held, **call(loss, 0, index=torch.tensor([5, 0, 7, 2, 5]))}
