"""Pure functions, no state: the mathematics of every module of this library."""

from .back_translation import back_translate
from .contrastive import info_nce
from .prototypes import prototype_cross_entropy, soft_targets

__all__ = ["back_translate", "info_nce", "prototype_cross_entropy", "soft_targets"]
