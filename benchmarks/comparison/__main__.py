"""``python -m benchmarks.comparison PLAN TABLE``: see :mod:`benchmarks.comparison.run`."""

from .run import main

if __name__ == "__main__":
    main()
