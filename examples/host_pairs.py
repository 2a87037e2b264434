"""The embedded pictures as a map-style data set of dicts, as a Trainer or a LightningModule takes it."""

from __future__ import annotations

import torch
from encoders import WordHash
from pairs import emoji_pairs
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY, LENGTH, SIDE = 1024, 12, 32


class PicturePairs(Dataset[dict[str, Tensor]]):
    """Every second Twemoji picture with the tokens of its caption, at most ``rows`` of them."""

    def __init__(self, rows: int | None = None) -> None:
        pairs = emoji_pairs(SIDE, styles=("twemoji",))
        pairs = pairs.subset(torch.arange(0, len(pairs), 2)[:rows])
        assert isinstance(pairs.pictures, Tensor)
        self.pixel_values = pairs.pictures.float() / 127.5 - 1
        self.captions = list(pairs.captions)
        self.input_ids = WordHash(VOCABULARY, LENGTH)(self.captions)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = self.input_ids[number]
        return {"pixel_values": self.pixel_values[number], "input_ids": tokens, "attention_mask": (tokens != 0).long()}
