"""Pure functions, no state: the mathematics of every module of this library."""

from .back_translation import back_translate
from .caption_ids import caption_ids
from .info_nce import info_nce
from .prototype_cross_entropy import prototype_cross_entropy
from .relational_distillation import relational_distillation
from .sigmoid_pair_loss import sigmoid_pair_loss
from .soft_targets import soft_targets

__all__ = [
    "back_translate",
    "caption_ids",
    "info_nce",
    "prototype_cross_entropy",
    "relational_distillation",
    "sigmoid_pair_loss",
    "soft_targets",
]
