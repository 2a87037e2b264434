"""Hugging Face transformers: a ``Trainer`` that trains a dual encoder with ProtoLoss. An epoch is an episode."""

from .model import add_heads, load_heads
from .trainer import ProtoCLIPTrainer

__all__ = ["ProtoCLIPTrainer", "add_heads", "load_heads"]
