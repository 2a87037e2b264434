"""A small real text encoder, for tests that need one in several processes."""

import zlib

import torch
import torch.nn.functional as F

CAPTIONS = [f"a photo of {count} {colour} {thing}" for count in ("one", "two", "three") for colour in ("red", "blue", "old")
            for thing in ("cats", "houses", "boats", "trees and a dog")]  # fmt: skip


class TextEncoder:
    """A seeded embedding bag over hashes of words; remembers the captions it was called with."""

    def __init__(self, width=12, seed=0):
        self.calls = []
        self.table = torch.randn(500, width, generator=torch.Generator().manual_seed(seed))

    @property
    def seen(self):
        """Every caption it was given, in order."""
        return [caption for call in self.calls for caption in call]

    def __call__(self, captions):
        self.calls.append(list(captions))
        assert not torch.is_grad_enabled()
        words = [torch.tensor([zlib.crc32(word.encode()) % 500 for word in caption.split()]) for caption in captions]
        starts = torch.tensor([0, *map(len, words[:-1])]).cumsum(0)
        return F.embedding_bag(torch.cat(words), self.table, starts, mode="mean")
