"""What happens between a pair and its features: augmentation, tokenizer, the two encoders with their heads."""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from protoclip_losses import ProjectionHead

# ---- augmentation ----------------------------------------------------------------------------------------------------

_DRAWS = 16


@dataclass
class Inputs:
    """How a model wants its pictures and captions."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenize: Callable[[list[str]], Tensor]

    @property
    def decoded_side(self) -> int:
        """Side of a decoded picture: a quarter larger, so that a crop of half the area is hardly enlarged."""
        return self.side + self.side // 4

    def augment(self, pictures: Tensor, index: Tensor, seed: int, episode: int, phase: int) -> Tensor:
        """The recipe's training augmentation of uint8 pictures (B, 3, s, s), on their device, normalised.

        Random crop of 0.5 to 1 of the area with aspect 3/4 to 4/3, flip, colour jitter (0.8, 0.8, 0.8, 0.2),
        grayscale and blur, the last three with probability 0.2. Picture i's random numbers are a hash of (seed, episode,
        phase, index[i]): they depend on no generator, loader worker, batch or number of processes, so a resumed run
        draws them again.
        """
        draws = torch.from_numpy(_uniforms(seed, episode, phase, index.numpy())).to(pictures.device)
        crop = _crop(pictures.float() / 255, draws[:, :6], self.side)
        jittered = draws[:, 6] < 0.2
        crop = torch.where(jittered[:, None, None, None], _jitter(crop, draws[:, 7:11]), crop)
        gray = draws[:, 11] < 0.2
        crop = torch.where(gray[:, None, None, None], _luma(crop), crop)
        blurred = draws[:, 12] < 0.2
        # Sigma from 0.1 to 2 pixels at a side of 224, in proportion at others.
        sigma = (0.1 + 1.9 * draws[:, 13]) * self.side / 224
        crop = torch.where(blurred[:, None, None, None], _blur(crop, sigma), crop)
        return self._normalise(crop)

    def plain(self, pictures: Tensor) -> Tensor:
        """Evaluation view of uint8 pictures (B, 3, s, s): resized, normalised, nothing random."""
        size = (self.side, self.side)
        return self._normalise(F.interpolate(pictures.float() / 255, size, mode="bilinear", antialias=True))

    def _normalise(self, pictures: Tensor) -> Tensor:
        mean, std = (pictures.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (pictures - mean) / std


def _uniforms(seed: int, episode: int, phase: int, index: NDArray[np.int64]) -> NDArray[np.float32]:
    """(B, 16) numbers in [0, 1): splitmix64 over the key of each row (Steele, Lea and Flood, OOPSLA 2014)."""

    def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(len(index), np.uint64)
    for part in (seed, episode, phase):
        state = mix(state * golden + np.uint64(part % 2**64) + golden)
    state = mix(state * golden + index.astype(np.uint64) + golden)
    counter = np.arange(1, _DRAWS + 1, dtype=np.uint64) * golden
    return ((mix(state[:, None] + counter) >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def _crop(pictures: Tensor, draws: Tensor, side: int) -> Tensor:
    area = 0.5 + 0.5 * draws[:, 0]
    aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    # Relative width and height; where the aspect does not fit, the crop is as wide or high as the picture.
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = (2 * draws[:, 2] - 1) * (1 - width), (2 * draws[:, 3] - 1) * (1 - height)
    flip = torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    theta = torch.stack([width * flip, zero, x, zero, height, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(pictures), 3, side, side], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _luma(pictures: Tensor) -> Tensor:
    red, green, blue = pictures.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None].expand_as(pictures)


def _jitter(pictures: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation by a factor in [0.2, 1.8] each, and a turn of the hue by up to 0.2 of a circle."""
    factor = (0.2 + 1.6 * draws[:, :3])[:, :, None, None, None]
    pictures = (pictures * factor[:, 0]).clamp(0, 1)
    middle = _luma(pictures).mean((1, 2, 3), keepdim=True)
    pictures = (middle + (pictures - middle) * factor[:, 1]).clamp(0, 1)
    gray = _luma(pictures)
    pictures = (gray + (pictures - gray) * factor[:, 2]).clamp(0, 1)
    # The hue turns about the gray axis: a rotation of RGB space (Rodrigues), batched, where HSV would branch per pixel.
    angle = (2 * draws[:, 3] - 1) * 0.2 * 2 * math.pi
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None] / math.sqrt(3)
    eye = torch.eye(3, device=pictures.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=pictures.device)
    turn = cos * eye + (1 - cos) / 3 + sin * cross
    return torch.einsum("bij,bjhw->bihw", turn, pictures).clamp(0, 1)


def _blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    reach = max(1, round(6 / 224 * pictures.shape[-1]))
    offset = torch.arange(-reach, reach + 1, device=pictures.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch, _, high, wide = pictures.shape
    planes = F.pad(pictures, (reach,) * 4, mode="replicate").transpose(0, 1)
    rows = F.conv2d(planes, kernel[:, None, None, :], groups=batch)
    return F.conv2d(rows, kernel[:, None, :, None], groups=batch).transpose(0, 1).view(batch, 3, high, wide)


# ---- tokenizer and encoders ------------------------------------------------------------------------------------------


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
            f"--model {name}: every name but 'small' is a model of open_clip, which is not installed: "
            "pip install open_clip_torch"
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
