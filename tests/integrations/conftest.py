"""The hosts' tests use what the others do: pictures of the example, and processes of their own."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples")]
