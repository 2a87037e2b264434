"""From a batch of decoded pictures to the input of a model: training augmentation and evaluation transform."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_DRAWS = 16


@dataclass
class Inputs:
    """What a model expects of its pictures and captions."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenize: Callable[[list[str]], Tensor]

    @property
    def decoded_side(self) -> int:
        """Side of a decoded picture: 25% larger, so that a crop of half the area is hardly upsampled."""
        return self.side + self.side // 4

    def augment(self, pictures: Tensor, index: Tensor, seed: int, episode: int, phase: int) -> Tensor:
        """The paper's training augmentation of uint8 pictures (B, 3, s, s), on their device, normalised.

        Random crop of 0.5 to 1 of the area with aspect ratio 3/4 to 4/3, flip, colour jitter (0.8, 0.8, 0.8, 0.2),
        grayscale and blur, the last three with probability 0.2. The random numbers of picture i are a hash of (seed,
        episode, phase, index[i]). They depend on no generator, loader worker, batch or number of processes, so that a
        resumed run draws the same ones.
        """
        draws = torch.from_numpy(_uniforms(seed, episode, phase, index.numpy()))
        on_device = draws.to(pictures.device)
        crop = _crop(pictures.float() / 255, on_device[:, :6], self.side)
        # The masks are computed on the CPU: nonzero() on a GPU would wait for it.
        jittered, gray, blurred = ((draws[:, column] < 0.2).nonzero()[:, 0].to(pictures.device) for column in (6, 11, 12))
        crop[jittered] = _jitter(crop[jittered], on_device[jittered, 7:11])
        crop[gray] = _luma(crop[gray])
        # Sigma is 0.1 to 2 pixels at a side of 224, and scales with the side.
        if len(blurred):  # a convolution with 0 groups is an error
            crop[blurred] = _blur(crop[blurred], (0.1 + 1.9 * on_device[blurred, 13]) * self.side / 224)
        return self._normalise(crop)

    def plain(self, pictures: Tensor) -> Tensor:
        """Evaluation transform of uint8 pictures (B, 3, s, s): resized and normalised."""
        size = (self.side, self.side)
        return self._normalise(F.interpolate(pictures.float() / 255, size, mode="bilinear", antialias=True))

    def _normalise(self, pictures: Tensor) -> Tensor:
        mean, std = (pictures.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (pictures - mean) / std


def _uniforms(seed: int, episode: int, phase: int, index: NDArray[np.int64]) -> NDArray[np.float32]:
    """(B, 16) numbers in [0, 1): splitmix64 of the key of each row (Steele, Lea and Flood, OOPSLA 2014)."""

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
    return (mix(state[:, None] + counter) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _crop(pictures: Tensor, draws: Tensor, side: int) -> Tensor:
    area = 0.5 + 0.5 * draws[:, 0]
    aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    # Relative width and height, clamped where a crop of this aspect ratio would not fit.
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
    """Brightness, contrast and saturation by a factor in [0.2, 1.8] each, and a hue shift of up to 0.2 of the circle."""
    factor = (0.2 + 1.6 * draws[:, :3])[:, :, None, None, None]
    pictures = (pictures * factor[:, 0]).clamp(0, 1)
    middle = _luma(pictures).mean((1, 2, 3), keepdim=True)
    pictures = (middle + (pictures - middle) * factor[:, 1]).clamp(0, 1)
    gray = _luma(pictures)
    pictures = (gray + (pictures - gray) * factor[:, 2]).clamp(0, 1)
    # The hue shift is a rotation of RGB space about the gray axis (Rodrigues): batched, where HSV would branch per pixel.
    angle = (2 * draws[:, 3] - 1) * 0.2 * 2 * math.pi
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None] / math.sqrt(3)
    eye = torch.eye(3, device=pictures.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=pictures.device)
    rotation = cos * eye + (1 - cos) / 3 + sin * cross
    return torch.einsum("bij,bjhw->bihw", rotation, pictures).clamp(0, 1)


def _blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    radius = max(1, round(6 / 224 * pictures.shape[-1]))
    offset = torch.arange(-radius, radius + 1, device=pictures.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch, _, height, width = pictures.shape
    planes = F.pad(pictures, (radius,) * 4, mode="replicate").transpose(0, 1)
    rows = F.conv2d(planes, kernel[:, None, None, :], groups=batch)
    return F.conv2d(rows, kernel[:, None, :, None], groups=batch).transpose(0, 1).view(batch, 3, height, width)
