"""What the arms of the comparison differ in: their settings, and the parts of the loop that only some of them use."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pairs import Pairs
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """All that an arm can differ in. The first block is what plain CLIP has, too."""

    passes: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    weight_decay: float = 0.2
    side: int = 24  # of the pictures as the encoder sees them
    drawings: str = "all"  # or "one" of each concept
    method: str = "clip"  # clip, episodic, or online
    # Prototypes are made anew before every `cluster_every`-th pass, from features extracted for it, or from those that the
    # pass before has computed anyway.
    features: str = "extracted"  # or "training"
    cluster_every: int = 1
    warmup_passes: int = 1
    last_passes: int = 0  # with InfoNCE only
    num_prototypes: int = 250
    target_temperature: float = 0.01  # 0: hard targets
    w_proto: float = 1.0
    w_external: float = 0.0  # of MiniLM as an external teacher of prototype terms
    external_target_temperature: float = 0.0
    back_translation: bool = True
    normalize_prototypes: bool = False
    head_width: int = 512
    head_norm: str = "batch"
    distill: str = "none"  # cosine or relational: the same teacher without prototypes
    w_distill: float = 1.0
    distill_temperature: float = 0.1
    # Of the grouping demonstration: image features turned out of the space of the text features by so many degrees, and
    # captions that stay one concept's own but are another's.
    gap: float = 0.0
    captions: str = "own"  # or "shuffled"
    judged_on: str = "all"  # or "validation", where hyperparameters are chosen: test pictures are then not even encoded


class Schedule:
    """Which passes have prototypes, and before which of them there is a new clustering."""

    def __init__(self, settings: Settings) -> None:
        self.first, self.end = settings.warmup_passes, settings.passes - settings.last_passes
        self.every = settings.cluster_every

    def with_prototypes(self, number: int) -> bool:
        return self.first <= number < self.end

    def clusters(self, number: int) -> bool:
        return self.with_prototypes(number) and (number - self.first) % self.every == 0


def is_evaluated(passes_done: int, passes: int) -> bool:
    """After the first two passes, after every second one, and at the end."""
    return passes_done <= 2 or passes_done % 2 == 0 or passes_done == passes


def apart(out: dict[str, Tensor], degrees: float) -> dict[str, Tensor]:
    r"""Features with a modality gap that no encoder can close.

    Images :math:`(\cos\theta\, x, \sin\theta\, x)` and texts :math:`(x, 0)`: within a modality all similarities stay as they are,
    between modalities they are :math:`\cos\theta` times what they were, and nothing at 90 degrees. A constant offset would not
    do: it is the same for every candidate, and a softmax does not see it.
    """
    share, own = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    images = {name: torch.cat([share * x, own * x], 1) for name, x in out.items() if name.startswith("image")}
    texts = {name: F.pad(x, (0, x.shape[1])) for name, x in out.items() if name.startswith("text")}
    return {**out, **images, **texts}


def one_each(pairs: Pairs) -> Tensor:
    """Rows of one drawing of each concept, which a hash of the concept picks, so that no style is left out."""
    rows: dict[int, list[int]] = {}
    for row, concept in enumerate(pairs.concepts.tolist()):
        rows.setdefault(concept, []).append(row)
    return torch.tensor([own[concept % len(own)] for concept, own in rows.items()])


def shuffled_captions(pairs: Pairs) -> list[str]:
    """For each picture the caption of another concept, the same one for all pictures of a concept.

    Concepts are numbered by a hash, so the next number is a concept that has nothing to do with it.
    """
    first: dict[int, str] = {}
    for concept, caption in zip(pairs.concepts.tolist(), pairs.captions, strict=True):
        first.setdefault(concept, caption)
    order = sorted(first)
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [first[other[concept]] for concept in pairs.concepts.tolist()]


def distillation(out: dict[str, Tensor], teacher: Tensor, settings: Settings) -> Tensor:
    r"""The ordinary ways to learn from a teacher's features t, mean over image and text heads.

    cosine: :math:`1 - h \cdot t`. relational: :math:`\mathrm{KL}(\mathrm{softmax}(t t^T / \tau)\,\|\,
    \mathrm{softmax}(s_p h h^T))` over the other samples of the batch.
    """
    t = F.normalize(teacher, dim=1)
    heads = [out["image_features_projected"], out["text_features_projected"]]
    if settings.distill == "cosine":
        return torch.stack([1 - (h * t).sum(1).mean() for h in heads]).mean()
    others = ~torch.eye(len(t), dtype=torch.bool)
    target = (t @ t.T / settings.distill_temperature)[others].view(len(t), -1).softmax(1)
    logits = [(out["logit_scale_proto"] * h @ h.T)[others].view(len(t), -1) for h in heads]
    return torch.stack([F.kl_div(x.log_softmax(1), target, reduction="batchmean") for x in logits]).mean()
