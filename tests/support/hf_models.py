"""Dual encoders of transformers with a few thousand random weights, and the inputs of a data set for them."""

import torch
import transformers as hf

TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 1024, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
BERT = {**TOWER, "vocab_size": 1024, "max_position_embeddings": 20}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
PATCHES = {**TOWER, "patch_size": 8, "num_patches": 16}
STAGES = {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]}
DIM = {"projection_dim": 16}


def _of_two_models():
    config = hf.VisionTextDualEncoderConfig(
        vision_config=hf.ViTConfig(**VISION).to_dict(), text_config=hf.BertConfig(**BERT).to_dict(), **DIM
    )
    return hf.VisionTextDualEncoderModel(config)


def _of_class(name, text, vision, **dim):
    return lambda: getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(text_config=text, vision_config=vision, **dim))


MODELS = {
    "CLIP": _of_class("CLIP", TEXT, VISION, **DIM),
    "Siglip": _of_class("Siglip", TEXT, VISION),
    "Siglip2": _of_class("Siglip2", TEXT, PATCHES),
    "ChineseCLIP": _of_class("ChineseCLIP", BERT, VISION, **DIM),
    "MetaClip2": _of_class("MetaClip2", TEXT, VISION, **DIM),
    "AltCLIP": _of_class("AltCLIP", {**BERT, "project_dim": 16}, VISION, **DIM),
    "CLIPSeg": _of_class("CLIPSeg", TEXT, VISION, **DIM),
    "Blip": _of_class("Blip", TEXT, VISION, **DIM),
    "GroupViT": _of_class("GroupViT", TEXT, {**VISION, **STAGES}, projection_intermediate_dim=16, **DIM),
    "OwlViT": _of_class("OwlViT", TEXT, VISION, **DIM),
    "VisionTextDualEncoder": _of_two_models,
}


def model(name):
    torch.manual_seed(0)
    return MODELS[name]()


def data(name, pairs):
    """The pairs with every input that the model can be given, and a column that it has no use for."""
    items = []
    for item in pairs:
        more = {"token_type_ids": torch.zeros_like(item["input_ids"])} if name in ("ChineseCLIP", "AltCLIP") else {}
        if name == "Siglip2":
            patches = item["pixel_values"].unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(16, 192)
            more = {"pixel_attention_mask": torch.ones(16, dtype=torch.int64), "spatial_shapes": torch.tensor([4, 4])}
            more["pixel_values"] = patches
        items.append({**item, **more, "caption": "unused"})
    return items
