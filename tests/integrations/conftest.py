"""The hosts' tests use what the others do: pictures of the example, and processes of their own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
