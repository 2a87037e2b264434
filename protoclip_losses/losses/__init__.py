"""The losses as modules: one file each."""

from .grad_cache import GradCache
from .info_nce import InfoNCE
from .proto_loss import ProtoLoss
from .prototype_loss import PrototypeLoss
from .relational_distillation import RelationalDistillation
from .sigmoid_pair_loss import SigmoidPairLoss

__all__ = ["GradCache", "InfoNCE", "ProtoLoss", "PrototypeLoss", "RelationalDistillation", "SigmoidPairLoss"]
