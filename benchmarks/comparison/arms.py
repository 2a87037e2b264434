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
    precision: str = "bf16"  # of the image encoder: "bf16", or "fp32" for processors without products of bfloat16
    side: int = 24  # of the pictures, in pixels, as the image encoder sees them
    drawings: str = "all"  # "all", or "one" of each concept
    samples: int = 0  # training pictures, drawn at random, the same ones for every seed; 0: all
    method: str = "clip"  # "clip", "episodic" or "online"
    episode_size: int = 0  # samples of an episode; 0: every training picture, so that an episode is a pass
    # Prototypes are recomputed before every `cluster_every`-th episode, from features extracted for it ("extracted"), or from
    # the features that training in the previous episode computed anyway ("training").
    features: str = "extracted"
    cluster_every: int = 1
    warmup_passes: float = 1
    last_passes: float = 0  # at the end, with InfoNCE only
    num_prototypes: int = 250
    target_temperature: float = 0.01  # 0: hard targets
    w_proto: float = 1.0
    teacher: str = "minilm"  # "minilm", "words" (of the training captions), or "both"
    w_external: float = 0.0  # weight of the prototype terms of the teacher
    teacher_clusters: str = "episode"  # the teacher is clustered in every "episode", or once, all samples: "whole"
    teacher_prototypes: int = 0  # 0: num_prototypes
    teacher_levels: tuple[int, ...] = ()  # numbers of clusters of further clusterings of a teacher, of the same weight each
    teacher_dim: int = 128  # of the words
    labels_per_sample: int = 1  # nearest centroids of the teacher
    external_target_temperature: float = 0.0
    back_translation: bool = True
    normalize_prototypes: bool = False
    head_width: int = 512
    head_norm: str = "batch"
    distill: str = "none"  # "relational": distillation of the same teacher
    w_distill: float = 1.0
    distill_temperature: float = 0.1
    sampled: float = 0.0  # the prototypes of each step: a random share of them, and those of the batch; 0: all
    word_classes: float = 0.0  # weight of the caption's words as classes of the picture
    repeats: str = "none"  # what pairs with the same caption are to each other in InfoNCE: "mask" or "share"
    # For the study of grouping: the angle in degrees between the spaces of image and text features, and whether each concept
    # has its "own" captions or, "shuffled", those of another concept.
    gap: float = 0.0
    captions: str = "own"
    judged_on: str = "all"  # "validation" while hyperparameters are chosen: test pictures are not even encoded then


class Schedule:
    """Which of the episodes use prototypes, and which of them start with a new clustering."""

    def __init__(self, settings: Settings, samples: int) -> None:
        self.episode_size = settings.episode_size or samples
        self.episodes = round(settings.passes * samples / self.episode_size)
        self.first = round(settings.warmup_passes * samples / self.episode_size)
        self.end = self.episodes - round(settings.last_passes * samples / self.episode_size)
        self.every = settings.cluster_every

    def with_prototypes(self, number: int) -> bool:
        return self.first <= number < self.end

    def clusters(self, number: int) -> bool:
        return self.with_prototypes(number) and (number - self.first) % self.every == 0


def is_evaluated(done: int, episodes: int) -> bool:
    """After the first two episodes, after every second one, and at the end."""
    return done <= 2 or done % 2 == 0 or done == episodes


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


def pool_rows(pairs: Pairs, settings: Settings) -> Tensor:
    """Rows that an arm trains on."""
    if settings.drawings == "one":
        return one_each(pairs)
    if settings.samples:
        return torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: settings.samples]
    return torch.arange(len(pairs))


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
