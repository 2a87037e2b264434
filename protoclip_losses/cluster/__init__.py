"""The command ``python -m protoclip_losses.cluster``."""

from .command import main as main
