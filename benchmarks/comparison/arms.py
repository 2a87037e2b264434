"""What differs between arms: their settings, and the parts of the training loop that only some arms use."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pairs import Pairs
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Everything an arm can set. The first block applies to plain CLIP as well."""

    passes: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    weight_decay: float = 0.2
    side: int = 24  # of the pictures, in pixels, as the image encoder sees them
    drawings: str = "all"  # "all", or "one" of each concept
    method: str = "clip"  # "clip", "episodic" or "online"
    # Prototypes are recomputed before every `cluster_every`-th pass, from features extracted for it ("extracted"), or from the
    # features that the previous training pass computed anyway ("training").
    features: str = "extracted"
    cluster_every: int = 1
    warmup_passes: int = 1
    last_passes: int = 0  # at the end, with InfoNCE only
    num_prototypes: int = 250
    target_temperature: float = 0.01  # 0: hard targets
    w_proto: float = 1.0
    w_external: float = 0.0  # weight of the prototype terms with MiniLM as external teacher
    external_target_temperature: float = 0.0
    back_translation: bool = True
    normalize_prototypes: bool = False
    head_width: int = 512
    head_norm: str = "batch"
    distill: str = "none"  # "cosine" or "relational": distillation from the same teacher, without prototypes
    w_distill: float = 1.0
    distill_temperature: float = 0.1
    # For the study of grouping: the angle in degrees between the spaces of image and text features, and whether each concept
    # has its "own" captions or, "shuffled", those of another concept.
    gap: float = 0.0
    captions: str = "own"
    judged_on: str = "all"  # "validation" while hyperparameters are chosen: test pictures are not even encoded then


class Schedule:
    """Which passes use prototypes, and which of them start with a new clustering."""

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

    Images become :math:`(\cos\theta\, x, \sin\theta\, x)` and texts :math:`(x, 0)`. Similarities within a modality do not
    change, those between modalities are multiplied by :math:`\cos\theta`, so they are 0 at 90 degrees. A constant offset
    between the modalities would have no effect: it adds the same to every logit of a row, and softmax is invariant to that.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    images = {name: torch.cat([cos * x, sin * x], 1) for name, x in out.items() if name.startswith("image")}
    texts = {name: F.pad(x, (0, x.shape[1])) for name, x in out.items() if name.startswith("text")}
    return {**out, **images, **texts}


def one_each(pairs: Pairs) -> Tensor:
    """Rows of one drawing per concept, picked by a hash of the concept, so that all styles occur."""
    rows: dict[int, list[int]] = {}
    for row, concept in enumerate(pairs.concepts.tolist()):
        rows.setdefault(concept, []).append(row)
    return torch.tensor([own[concept % len(own)] for concept, own in rows.items()])


def shuffled_captions(pairs: Pairs) -> list[str]:
    """For each picture the caption of another concept, the same one for all pictures of a concept.

    Concept numbers are hashes, so the concept with the next number is an unrelated one.
    """
    first: dict[int, str] = {}
    for concept, caption in zip(pairs.concepts.tolist(), pairs.captions, strict=True):
        first.setdefault(concept, caption)
    order = sorted(first)
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [first[other[concept]] for concept in pairs.concepts.tolist()]


def distillation(out: dict[str, Tensor], teacher: Tensor, settings: Settings) -> Tensor:
    r"""Plain distillation of a teacher's features t, averaged over the image and the text head.

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
