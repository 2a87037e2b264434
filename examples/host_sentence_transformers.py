"""A small CLIP model trained by sentence-transformers with ProtoLoss, on the embedded pictures:

python examples/host_sentence_transformers.py --output runs/st
torchrun --standalone --nproc-per-node 2 examples/host_sentence_transformers.py --output runs/st --batch-size 32
python examples/host_sentence_transformers.py --output runs/st --resume
python examples/host_sentence_transformers.py --output runs/plain --loss plain   # without us
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from host_pairs import LENGTH, SIDE
from pairs import emoji_pairs
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from protoclip_losses import EpisodicClusterer, ProtoLoss, TeacherAdapter
from protoclip_losses.integrations.sentence_transformers import ProtoCLIPCallback, ProtoCLIPLoss
from protoclip_losses.metrics import retrieval_recall


def picture_pairs(start: int = 0, rows: int | None = None) -> Dataset:
    """Every second Twemoji picture with its caption. The column label is the sample index."""
    pairs = emoji_pairs(SIDE, styles=("twemoji",))
    pairs = pairs.subset(torch.arange(start, len(pairs), 2)[:rows])
    assert isinstance(pairs.pictures, torch.Tensor)
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pairs.pictures]
    return Dataset.from_dict({"image": pictures, "caption": list(pairs.captions), "label": range(len(pairs))})


def write_small_model(folder: Path, captions: list[str]) -> None:
    """A CLIP with random weights, and the captions' words as its vocabulary."""
    words = sorted({word for caption in captions for word in caption.lower().replace(",", " ").split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "model_max_length": LENGTH}
    size = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessor(size=size, crop_size=size)
    CLIPProcessor(pictures, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)).save_pretrained(folder)

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": LENGTH,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--rows", type=int, help="pairs to train on; default: all")
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--loss", choices=["proto", "words", "info_nce", "plain"], default="proto")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    args = SentenceTransformerTrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=options.save_steps,
        seed=options.seed,
        ddp_find_unused_parameters=False,
        report_to="none",
    )
    pairs = picture_pairs(0, options.rows)
    with args.main_process_first():
        if args.should_save:
            write_small_model(options.output / "start", pairs["caption"])
        model = SentenceTransformer(str(options.output / "start"))
    heads = {"dim": 32, "hidden_dim": 128, "norm": "layer"}
    if options.loss == "plain":
        symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        loss, callbacks = MultipleNegativesRankingLoss(model, **symmetric), []
    elif options.loss == "words":
        words = TeacherAdapter.from_captions(pairs["caption"])
        clusters = EpisodicClusterer(num_prototypes=len(pairs) // 10).fit_teacher(words)
        loss = ProtoCLIPLoss(model, ProtoLoss(w_proto=0), teachers={"words": clusters}, heads=heads)
    else:
        loss = ProtoCLIPLoss(model, heads=heads)
    if options.loss != "plain":
        never = options.epochs if options.loss == "info_nce" else 1
        callbacks = [ProtoCLIPCallback(loss, warmup_epochs=never)]
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()

    if args.process_index == 0:
        others = picture_pairs(1, options.rows)
        image, text = (model.encode(others[name], convert_to_tensor=True) for name in ("image", "caption"))
        print(retrieval_recall(image, text))
    if dist.is_initialized():  # a process can abort if another one ends before it
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
