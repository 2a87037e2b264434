"""Inputs of a model in chunks of rows, and its outputs put together again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._dtypes import may_read_values


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a model's inputs."""

    inputs: Sequence[Any]
    keywords: Mapping[str, Any]
    rows: slice

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def run(self, model: Callable[..., Any]) -> Any:
        """What the model returns for these rows."""
        return model(*self.inputs, **self.keywords)


def chunks_of(inputs: Sequence[Any], chunk_size: int) -> list[Chunk]:
    """The inputs of a model, split by rows: tensors and lists; a mapping becomes keywords."""
    keywords = {name: x for given in inputs if isinstance(given, Mapping) for name, x in given.items()}
    positional = [x for x in inputs if not isinstance(x, Mapping)]
    by_name = {**{str(i): x for i, x in enumerate(positional)}, **keywords}
    for name, x in by_name.items():
        if isinstance(x, tuple):
            raise TypeError(f"input {name} must be a tensor, a list of rows or a mapping, got a tuple: pass its items one by one")
    sizes = {name: len(x) for name, x in by_name.items() if _has_rows(x)}
    if not sizes:
        raise TypeError(f"inputs must hold a tensor or a list with rows, got {[type(x).__name__ for x in by_name.values()]}")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"inputs must have the same number of rows, got {sizes}")
    total = next(iter(sizes.values()))
    if total == 0:
        raise ValueError("inputs must have at least one row, got 0")

    def chunk(rows: slice) -> Chunk:
        part = {name: x[rows] if _has_rows(x) else x for name, x in keywords.items()}
        return Chunk([x[rows] if _has_rows(x) else x for x in positional], part, rows)

    return [chunk(slice(start, min(start + chunk_size, total))) for start in range(0, total, chunk_size)]


def _has_rows(x: Any) -> bool:
    return x.dim() > 0 if isinstance(x, Tensor) else isinstance(x, list)


def mapped(function: Callable[..., Any], name: str, *trees: Any) -> Any:
    """``function(name, *leaves)`` of the leaves of mappings, tuples and lists of one structure."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: mapped(function, str(key), *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(mapped(function, str(i), *parts) for i, parts in enumerate(zip(*trees, strict=True)))
    return function(name, *trees)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in mappings, tuples and lists, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for x in tree.values():
            yield from tensors_of(x)
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tensors_of(x)


class CachedOutputs:
    """The outputs of all chunks as those of one batch, without a graph.

    Attributes:
        whole: of the structure of one chunk's output. Tensors are leaves that take the gradient of the loss.

    Raises:
        ValueError: rows that are not those of the chunk, or another scalar in another chunk.
    """

    def __init__(self, outputs: Sequence[Any], chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self._leaves: list[tuple[Tensor, bool]] = []  # with whether all chunks share it
        self.whole = mapped(self._join, "output", *outputs)

    def _join(self, name: str, *parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        is_shared = parts[0].dim() < 2 and parts[0].numel() == 1
        if is_shared:
            leaf = parts[-1].detach().clone()
            if may_read_values(leaf) and any(not torch.equal(part, leaf) for part in parts):
                raise ValueError(
                    f"output {name!r} of the model must be the same for every chunk, got {[x.item() for x in parts]}"
                )
        else:
            for part, chunk in zip(parts, self.chunks, strict=True):
                if part.dim() == 0 or part.shape[0] != len(chunk):
                    raise ValueError(
                        f"output {name!r} of the model must have {len(chunk)} rows as its inputs, got shape {tuple(part.shape)}"
                    )
            leaf = torch.cat([part.detach() for part in parts])
        leaf.requires_grad_(leaf.is_floating_point() and torch.is_grad_enabled())
        self._leaves.append((leaf, is_shared))
        return leaf

    def gradients(self, output: Any, number: int, *, with_shared: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors in the output of a chunk that has run again, and the gradient of the loss with respect to each."""
        tensors, gradients = [], []
        for x, (leaf, is_shared) in zip(tensors_of(output), self._leaves, strict=True):
            if x.requires_grad and leaf.grad is not None and (with_shared or not is_shared):
                tensors.append(x)
                gradients.append(leaf.grad if is_shared else leaf.grad[self.chunks[number].rows])
        return tensors, gradients
