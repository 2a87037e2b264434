"""What the modules of this folder share that hold a process group or a state."""

import copy
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..distributed import Group, RankRows, Signature, active_group, check_process_group, validate_rows, world_size
from ..kernels.sizes import BlockLimit
from .misuse import warn_of_waiting

Method = TypeVar("Method", bound=Callable[..., Any])
T = TypeVar("T")


def untraced_if(condition: Callable[[Any], bool], reason: str) -> Callable[[Method], Method]:
    """A method that ``torch.compile`` does not trace, but runs as it is, for modules of which ``condition`` holds."""
    options = {"reason": reason} if "reason" in signature(torch.compiler.disable).parameters else {}  # torch 2.4 has none

    def decorator(method: Method) -> Method:
        untraced = torch.compiler.disable(method, **options)  # type: ignore[no-untyped-call]

        @wraps(method)
        def wrapper(self, *args, **kwargs):  # type: ignore[no-untyped-def]  # torch 2.4 cannot trace annotations
            if torch.compiler.is_compiling() and condition(self):
                return untraced(self, *args, **kwargs)
            return method(self, *args, **kwargs)

        return cast(Method, wrapper)

    return decorator


class LossModule(nn.Module):
    """A loss that can be copied with its process group, and that loads from a checkpoint made before the model had it."""

    process_group: Group | bool | None
    equal_batch_sizes: bool
    was_called = False  # some mistakes are looked for in the first call alone
    _compared: object = None  # the settings that all ranks are known to agree on

    def _validate_rows(
        self,
        check: Callable[[], T],
        rows: int,
        signature: Signature,
        like: object,
        digest: Callable[[], int] | None = None,
        *,
        settings: object = None,
    ) -> tuple[T, RankRows]:
        """:func:`~protoclip_losses.distributed.validate_rows` of a training step.

        Under the promise of ``equal_batch_sizes`` ranks exchange sizes, verdicts and signatures in the first call alone, and in
        the first with other ``settings``, which must change on all of them together.
        """
        group = active_group(self.process_group)
        if group is None:
            return validate_rows(check, None, rows)
        if not self.equal_batch_sizes:
            warn_of_waiting(group)
            return validate_rows(check, group, rows, signature, like, digest)
        if self._compared != (group.group_name, settings):
            result, ranks = validate_rows(check, group, rows, signature, like, digest)
            if len(set(ranks.sizes)) > 1:
                raise ValueError(f"equal_batch_sizes must be False where ranks have different numbers of rows, got {ranks.sizes}")
            self._compared = group.group_name, settings
            return result, ranks
        return check(), RankRows(group, [rows] * world_size(group))

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
        return {**self.__dict__, "_compared": None}  # other processes will load it

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint without this loss leaves it as it is, also with ``strict=True``."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys: list[str] = args[2]
        if f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")


class BatchLoss(LossModule):
    """A loss over the batch of all ranks, with the settings that each of these has."""

    def __init__(
        self,
        process_group: Group | bool | None,
        equal_batch_sizes: bool,
        chunk_size: int | None,
        memory_budget: int | None,
        check_values: bool | None,
    ) -> None:
        super().__init__()
        BlockLimit(chunk_size, memory_budget)
        self.process_group, self.equal_batch_sizes = check_process_group(process_group), equal_batch_sizes
        self.chunk_size, self.memory_budget, self.check_values = chunk_size, memory_budget, check_values

    def extra_repr(self) -> str:
        blocks = f"chunk_size={self.chunk_size}, memory_budget={self.memory_budget}"
        return f"equal_batch_sizes={self.equal_batch_sizes}, {blocks}"

    def block_limit(self) -> BlockLimit:
        """What the caller says of the blocks."""
        return BlockLimit(self.chunk_size, self.memory_budget)
