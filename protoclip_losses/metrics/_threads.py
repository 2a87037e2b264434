"""How many threads scikit-learn's solvers get."""

from contextlib import AbstractContextManager
from typing import Any

from .. import _checks as check


def few_threads(numbers: int) -> AbstractContextManager[Any]:
    """One thread for small problems: there BLAS threads wait for each other longer than they work (30 times, measured)."""
    # threadpoolctl comes with scikit-learn.
    limits: AbstractContextManager[Any] = check.require("threadpoolctl", "metrics").threadpool_limits(
        1 if numbers < 2**22 else None
    )
    return limits
