"""A small CLIPModel trained by transformers' Trainer with ProtoLoss, on the embedded pictures:

python examples/host_transformers.py --output runs/trainer
torchrun --standalone --nproc-per-node 2 examples/host_transformers.py --output runs/trainer --batch-size 32
python examples/host_transformers.py --output runs/trainer --resume
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from host_pairs import LENGTH, SIDE, VOCABULARY, PicturePairs
from transformers import CLIPConfig, CLIPModel, TrainingArguments

from protoclip_losses.integrations.transformers import ProtoCLIPTrainer


def small_model() -> CLIPModel:
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rows", type=int, help="pairs to train on; default: all")
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    args = TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=options.save_steps,
        report_to="none",
    )
    trainer = ProtoCLIPTrainer(
        model=small_model(),
        args=args,
        train_dataset=PicturePairs(options.rows),
        # The only argument that Trainer does not have.
        heads={"dim": 32, "hidden_dim": 128, "norm": "layer"},
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    if dist.is_initialized():  # a process can abort if another one ends before it
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
