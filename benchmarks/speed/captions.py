"""Time and memory of the teacher made of the captions' words, on generated captions as long as real ones and as varied.

    python -m benchmarks.speed.captions                 # 2,500,000 captions, minutes
    python -m benchmarks.speed.captions --clusters 20000

A caption has 3 to 40 words, log-normal with a mean of about 10, drawn from 60,000 words by Zipf's law, as those of Conceptual
Captions are. They are no real captions, so the script measures cost and not quality. Peak memory is that of the whole process;
its memory with the captions alone is printed first.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from protoclip_losses import EpisodicClusterer, TeacherAdapter

from .measure import machine

WORDS = 60_000
EXPONENT = 1.05


def generated(rows: int, seed: int = 0) -> list[str]:
    """Captions of made-up words."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(2.25, 0.45, rows).round().clip(3, 40).astype(int)
    share = 1 / np.arange(1, WORDS + 1) ** EXPONENT
    vocabulary = [f"w{number}" for number in range(WORDS)]
    ends = np.cumsum(lengths)
    numbers = draw.choice(WORDS, ends[-1], p=share / share.sum()).astype(np.int32)
    return [" ".join([vocabulary[i] for i in numbers[end - n : end]]) for end, n in zip(ends, lengths, strict=True)]


def peak() -> float:
    """Gigabytes of the process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def timed(stage: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    print(
        f"{stage}: {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU, peak {peak():.2f} GB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2_500_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=0, help="also cluster the rows once; 0: do not")
    args = parser.parse_args()
    print(machine("cpu"))
    texts = generated(args.captions)
    print(f"{len(texts):,} generated captions; with them the process has {peak():.2f} GB", flush=True)
    with timed("teacher of the words"):
        teacher = TeacherAdapter.from_captions(texts, args.dim)
    with timed("encode 1,000 captions that are new"):
        teacher.encode(generated(1000, seed=1))
    if args.clusters:
        with timed(f"{args.clusters:,} clusters of all rows, once"):
            labels = EpisodicClusterer(args.clusters).fit_teacher(teacher).labels
        assert labels is not None
        print(f"{int((labels < 0).sum()):,} captions without a label, {len(torch.unique(labels)):,} labels in use")


if __name__ == "__main__":
    main()
