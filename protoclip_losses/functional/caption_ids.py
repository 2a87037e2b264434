"""Ids of captions, by which repeated ones are known."""

import hashlib
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check


def caption_ids(texts: Sequence[str]) -> Tensor:
    """An id for each caption, equal for captions that differ in case, white space or Unicode composition alone.

    Ids are hashes, the same in every batch, process and run: InfoNCE with ``repeats`` takes them as ``ids``.

    **Use it when:** captions of a batch may repeat.
    **Not when:** each caption stands once in a batch: every one costs a hash.
    **Related:** :func:`info_nce` and :class:`protoclip_losses.ProtoLoss`, whose ``repeats`` say what equal ids mean.

    Args:
        texts: n captions.

    Returns:
        (n,) int64.

    Raises:
        TypeError: texts that are no list of strings.

    Example:
        >>> ids = caption_ids(["A dog", "a  dog ", "a cat"])
        >>> bool(ids[0] == ids[1]), bool(ids[0] == ids[2])
        (True, False)
    """
    numbers = []
    for text in check.strings("texts", texts):
        folded = " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())
        digest = hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        numbers.append(int.from_bytes(digest, "little", signed=True))
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
