"""From a batch of decoded pictures to a model's input: the training augmentation and the plain view."""

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
        draws = torch.from_numpy(_uniforms(seed, episode, phase, index.numpy()))
        there = draws.to(pictures.device)
        crop = _crop(pictures.float() / 255, there[:, :6], self.side)
        # Which pictures are changed is known on the CPU, so only those are worked on and no device has to be waited for.
        jittered, gray, blurred = ((draws[:, column] < 0.2).nonzero()[:, 0].to(pictures.device) for column in (6, 11, 12))
        crop[jittered] = _jitter(crop[jittered], there[jittered, 7:11])
        crop[gray] = _luma(crop[gray])
        # Sigma from 0.1 to 2 pixels at a side of 224, in proportion at others.
        if len(blurred):  # a convolution of no group at all is an error
            crop[blurred] = _blur(crop[blurred], (0.1 + 1.9 * there[blurred, 13]) * self.side / 224)
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
    return (mix(state[:, None] + counter) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


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
