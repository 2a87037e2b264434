"""open_clip 3.3: its own trainer with ProtoLoss instead of its loss; run it with ``python -m``. And a task for 4.x."""

from .arguments import parse_arguments
from .checkpoint import join_heads, parameter_names, separate_heads
from .launcher import Launcher, main
from .model import OpenClipLoss, add_heads
from .task import prototype_task

__all__ = [
    "Launcher",
    "OpenClipLoss",
    "add_heads",
    "join_heads",
    "main",
    "parameter_names",
    "parse_arguments",
    "prototype_task",
    "separate_heads",
]
