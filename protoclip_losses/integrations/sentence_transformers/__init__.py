"""sentence-transformers: a loss for its Trainer, and a callback that makes each epoch an episode."""

from .callback import ProtoCLIPCallback
from .loss import ProtoCLIPLoss

__all__ = ["ProtoCLIPCallback", "ProtoCLIPLoss"]
