"""What the modules of this folder share that hold a process group or a state."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..distributed import Group


class LossModule(nn.Module):
    """A loss that can be copied with its process group, and that loads from a checkpoint made before the model had it."""

    process_group: Group | bool | None
    was_called = False  # some mistakes are looked for in the first call alone

    def __deepcopy__(self, memo: dict[int, Any]) -> "LossModule":
        """A copy that communicates with the same processes: a group itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled. A process group exists in its process alone."""
        if not (self.process_group is None or isinstance(self.process_group, bool)):
            raise TypeError(
                f"process_group of a {type(self).__name__} cannot be pickled: set loss.process_group=None before, and after it "
                "the group of the process that unpickles it"
            )
        return self.__dict__

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint without this loss leaves it as it is, also with ``strict=True``."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys: list[str] = args[2]
        if f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")
