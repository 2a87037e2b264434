"""Benchmarks, run from the root of the repository: ``python -m benchmarks.comparison``, ``python -m benchmarks.speed.losses``."""

import sys
from pathlib import Path

# The benchmarks use the models, the data and the training helpers of the examples. Those are scripts that import each other
# by bare names, so their folder has to be on the path. It goes first: other packages are called "evaluate" or "pairs", too.
_EXAMPLES = str(Path(__file__).parents[1] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.insert(0, _EXAMPLES)
