"""A training set with sample numbers, and a collator that passes them around the user's own."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset


class NumberedItem(NamedTuple):
    """An item as the data set gives it, whatever it is, and its number."""

    item: Any
    number: int


class NumberedData(Dataset[NumberedItem]):
    """A map-style data set of :class:`NumberedItem`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> NumberedItem:
        return NumberedItem(self.dataset[number], number)


class CollateNumbered:
    """Trainer's collator of the items, and their numbers as ``index``. Other items, in evaluation, are left to the collator."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        if not isinstance(items[0], NumberedItem):
            return self.collate(items)
        kept = [number for item, number in items if item is not None]
        try:
            batch = self.collate([item for item, _ in items])
        except Exception as error:
            bad = next((x for x in items if x.item is None), items[0])
            if _has_fields(bad.item):
                raise
            raise TypeError(_wanted(bad, f"data_collator failed with {type(error).__name__}: {error}")) from error
        if not isinstance(batch, Mapping) or not batch:
            got = "an empty batch" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise TypeError(_wanted(items[0], f"data_collator made {got} of such items"))
        if len(kept) < len(items) and (rows := _rows(batch)) != len(kept):
            raise ValueError(f"data_collator must leave out the {len(items) - len(kept)} items that are None, got {rows} rows")
        return {**batch, "index": torch.tensor(kept, dtype=torch.int64)}


def _has_fields(item: Any) -> bool:
    return isinstance(item, Mapping) or (hasattr(item, "__dict__") and not isinstance(item, torch.Tensor))


def _wanted(item: NumberedItem, got: str) -> str:
    return (
        f"train_dataset[{item.number}] must be a mapping or a dataclass of the model's inputs, or something that data_collator "
        f"makes a mapping of, got {type(item.item).__name__}: {got}"
    )


def _rows(batch: Mapping[str, Any]) -> int:
    columns = [x for x in (batch.get("pixel_values"), *batch.values()) if isinstance(x, torch.Tensor) and x.dim()]
    return len(columns[0]) if columns else 0
