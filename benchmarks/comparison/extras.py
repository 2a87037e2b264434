"""Objectives that are arms of the comparison and no part of the library: what they gain did not ask for more."""

import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip_losses import Prototypes
from protoclip_losses.functional import prototype_cross_entropy

WORDS_PER_CAPTION = 8


class WordClasses(nn.Module):
    """The words of a caption as classes of its picture, weighted by IDF, with a learned prototype each.

    After SuperCLIP, https://arxiv.org/abs/2512.14480, by :func:`prototype_cross_entropy` with a mixture of labels.
    """

    def __init__(self, captions: list[str], vocabulary: int, width: int, seed: int) -> None:
        super().__init__()
        found = [list(dict.fromkeys(re.findall(r"\w+", caption.lower())))[:WORDS_PER_CAPTION] for caption in captions]
        counts = Counter(word for words in found for word in words)
        number = {word: i for i, (word, _) in enumerate(counts.most_common(vocabulary))}
        self.labels = torch.full((len(captions), WORDS_PER_CAPTION), -1)
        for row, words in enumerate(found):
            known = [number[word] for word in words if word in number]
            self.labels[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
        times = torch.tensor([counts[word] for word in number], dtype=torch.float32)
        self.idf = torch.log(len(captions) / times)
        draw = torch.Generator().manual_seed(seed)
        self.prototypes = nn.Parameter(torch.randn(len(number), width, generator=draw) / width**0.5)

    def forward(self, image: Tensor, index: Tensor, logit_scale: Tensor) -> Tensor:
        labels = self.labels[index]
        weights = self.idf[labels.clamp(min=0)].where(labels >= 0, 0)
        return prototype_cross_entropy(image, F.normalize(self.prototypes, dim=1), labels, logit_scale, label_weights=weights)


def sampled_terms(prototypes: Prototypes, out: dict[str, Tensor], index: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """The prototype terms, hard targets, over a random share of the prototypes and those of the batch: the mean over terms."""
    positions = prototypes.positions(index)
    losses = []
    for (student, teacher), term in prototypes.terms.items():
        labels = prototypes.labels_by_teacher[teacher][positions]
        drawn = torch.rand(len(term.prototypes), generator=draw) < share
        drawn[labels[labels >= 0]] = True
        features, scale = out[f"{student}_features_projected"], out["logit_scale_proto"]
        losses.append(prototype_cross_entropy(features, term.prototypes, labels, scale, valid=term.valid & drawn))
    return torch.stack(losses).mean()
