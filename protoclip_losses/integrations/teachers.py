"""What the hosts check of external teachers before training."""

import warnings
from collections.abc import Mapping
from typing import Any


def check_rows(teachers: Mapping[str, Any], samples: int, data: str) -> None:
    """Compare the rows of teachers with the samples of the data, once: row i has to belong to sample i.

    Raises:
        ValueError: a teacher with fewer rows. One with more is a warning. Rows with sample numbers of their own are not compared.
    """
    for name, teacher in teachers.items():
        if getattr(teacher, "has_index", False) or not hasattr(teacher, "__len__"):
            continue
        if len(teacher) < samples:
            raise ValueError(
                f"teachers[{name!r}] must have a row for each of the {samples} samples of {data}, got {len(teacher)} rows"
            )
        if len(teacher) > samples:
            warnings.warn(
                f"teachers[{name!r}] has {len(teacher)} rows and {data} {samples} samples: row i is taken for sample i, so give "
                "the teacher the rows of those samples, in their order",
                stacklevel=3,
            )
