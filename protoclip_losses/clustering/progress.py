"""How far K-means is: a bar if tqdm is installed, else lines on stderr."""

import sys
import time
from collections.abc import Sequence


class Progress:
    """Shows iterations, objective and the time that is left at most.

    Args:
        runs: number of runs.
        niter: iterations of each, at most.
        what: the name of what is clustered.
    """

    def __init__(self, runs: int, niter: int, what: str = "K-means") -> None:
        self.runs, self.niter, self.what = runs, niter, what
        self.start, self.first = time.perf_counter(), 0
        try:
            from tqdm.auto import tqdm
        except ImportError:
            self.bar = None
            self._say(f"{what}: seeding")
        else:
            self.bar = tqdm(desc=f"{what}: seeding", total=runs * niter, unit="iteration")

    def update(self, run: int, objectives: Sequence[float]) -> None:
        """A run has started, with no objective, or ended an iteration."""
        done = run * self.niter + len(objectives)
        title = self.what if self.runs == 1 else f"{self.what}, run {run + 1} of {self.runs}"
        objective = f"objective {objectives[-1]:.6g}" if objectives else "seeded"
        if self.bar is not None:
            self.bar.set_description(title, refresh=False)
            self.bar.set_postfix_str(objective, refresh=False)
            self.bar.update(done - self.bar.n)
            self.bar.refresh()
            return
        left = ""
        if objectives:
            each = (time.perf_counter() - self.start) / max(1, done - self.first)
            left = f", {each:.1f} s each, at most {each * (self.runs * self.niter - done):.0f} s left"
        else:
            self.start, self.first = time.perf_counter(), done
        self._say(f"{title}: iteration {len(objectives)} of at most {self.niter}, {objective}{left}")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """There is nothing more to show."""
        if self.bar is not None:
            self.bar.close()
