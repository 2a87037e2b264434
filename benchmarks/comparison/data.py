"""The data sets of the comparison by name: how each is loaded, split and judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from augment import Inputs
from encoders import DualEncoder
from pairs import Pairs
from torch import Tensor

from . import emoji_styles, icon_metrics, icons, metrics


class Evaluation(Protocol):
    """Metrics on parts that are not trained on, as columns `part/metric`."""

    def quick(self, model: DualEncoder) -> dict[str, float]:
        """Those that are computed along the way."""
        ...

    def full(self, model: DualEncoder) -> dict[str, float]:
        """Those of the end."""
        ...


class DataSet(NamedTuple):
    """What a run needs to know of the data. `columns` are all that its evaluation has."""

    load: Callable[[Path], Pairs]
    splits: Callable[[Pairs], dict[str, Tensor]]
    evaluation: Callable[[Pairs, dict[str, Tensor], Inputs, str], Evaluation]
    columns: tuple[str, ...]


DATA: dict[str, DataSet] = {
    "emoji": DataSet(emoji_styles.load, emoji_styles.splits, metrics.Evaluation, metrics.COLUMNS),
    "icons": DataSet(icons.load, icons.splits, icon_metrics.IconEvaluation, icon_metrics.COLUMNS),
}


def file_of(name: str, given: Path | None) -> Path:
    """The file of the pictures: the one that was given, or `runs/NAME.npz`."""
    return given or Path(f"runs/{name}.npz")


def plan_data(plan: dict[str, Any]) -> str:
    """Name of the data set of a plan; the emoji where it has none."""
    name = str(plan.get("data", "emoji"))
    if name not in DATA:
        raise SystemExit(f"data of a plan must be among {sorted(DATA)}, got {name!r}")
    return name
