"""Pictures as people have them: turned by their EXIF, with 16 bits, palettes or transparency."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# The EXIF orientation of a picture, and what makes it upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, side: int) -> Tensor:
    """Picture bytes to uint8 (3, side, side): upright, the centre square, on white where transparent. OSError if truncated."""
    with Image.open(io.BytesIO(data)) as opened:
        # A JPEG is decoded at the smallest fraction that is large enough: several times faster, and a truncated file is still
        # noticed, because every byte is read.
        opened.draft("RGB", (side, side))
        picture = _eight_bits(opened)
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        # Not ImageOps.exif_transpose, which fails for pictures that are fine but for other tags of their EXIF.
        orientation = _orientation(opened)
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
        square = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # whatever Pillow raises on broken EXIF
        return 1


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a band: Pillow clips grey of 16 bits instead of scaling it, to white nearly everywhere."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    top = 1.0 if picture.mode == "F" else 65535
    if not ((values >= 0) & (values <= top)).all():
        raise OSError(f"the grey values of a picture of mode {picture.mode} must be in [0, {top:g}]")
    grey = Image.fromarray((values * 255.0).astype(np.uint8) if picture.mode == "F" else (values >> 8).astype(np.uint8))
    if isinstance(clear := picture.info.get("transparency"), int):  # this value, before it is scaled
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
