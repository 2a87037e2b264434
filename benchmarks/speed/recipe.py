"""Estimated time and memory of the CC3M recipe by stage: the cost of each stage here, times how often the recipe runs it.

    python -m benchmarks.speed.recipe --rst benchmarks/speed/results/recipe.rst     # needs open_clip; 12 minutes on 2 cores

Training and extraction are measured relative to CLIP's step with the same model and batch (`hosts.py`). Hours follow from the
paper's time for CLIP on one GPU, or from your own (`--clip-hours`). Clustering is measured in seconds on this machine's CPU, of
which each process is assumed to have one: K-means of image, text and one teacher with `nredo=3` each, back translation, and
targets, on mixtures of as many groups as there are prototypes. Decoding of pictures by the data loader is not included.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from protoclip_losses import EpisodicClusterer, FeatureBank, TeacherAdapter

from .clustering import features_of
from .hosts import steps
from .measure import csv_table, interleaved, machine, peak_extra_bytes, ratio

STAGES = {
    "without": "training, CLIP",
    "with": "training with prototype terms",
    "online": "training with online prototypes, renewal included",
    "extraction": "extraction",
}
# The totals that each stage is part of.
MODES = {"without": (), "with": ("episodic",), "online": ("online",), "extraction": ("episodic",)}
PUBLISHED_HOURS = 1.03 * 24  # the paper's CLIP on one 2080 Ti, for as many samples as RECIPES["one GPU"]
RECIPES = {"one GPU": (100, 1), "eight GPUs": (400, 8)}  # episodes, processes


def clustering(rows: int, prototypes: int, width: int, teacher: int) -> tuple[float, float]:
    """Seconds and MB of one episode's `build` from a full bank."""
    images, others = (features_of(f"mixture/{rows}/{prototypes}/{w}")[0] for w in (width, teacher))
    bank = FeatureBank(torch.arange(rows), width)
    bank.update(bank.index, images, images.roll(1, dims=1))
    external = {"teacher": TeacherAdapter.from_tensor(others)}
    del images
    clusterer = EpisodicClusterer(prototypes, niter=20, nredo=3)
    start = time.perf_counter()
    extra = peak_extra_bytes(lambda: clusterer.build(bank, external))
    return time.perf_counter() - start, extra / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RN50-quickgelu", help="name of the open_clip model")
    parser.add_argument("--batch", type=int, default=64, help="batch size of the measured calls")
    parser.add_argument("--episode-size", type=int, default=200_000)
    parser.add_argument("--prototypes", type=int, default=20_000)
    parser.add_argument("--clip-hours", type=float, default=PUBLISHED_HOURS, help="hours of CLIP for 100 episodes on one GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rst", type=Path, help="also write the table to this RST file")
    args = parser.parse_args()
    seconds, memory = clustering(args.episode_size, args.prototypes, 128, 64)
    print(f"clustering: {seconds:.0f} s, {memory:.0f} MB", flush=True)
    times = interleaved(steps("open_clip", args.model, args.batch, args.prototypes, args.episode_size), repeats=args.repeats)
    header = ["stage", "measured", *(f"{name}, hours" for name in RECIPES)]
    table, sums = [], {"episodic": [0.0] * len(RECIPES), "online": [0.0] * len(RECIPES)}
    for name, title in STAGES.items():
        share = statistics.median(a / b for a, b in zip(times[name], times["without"], strict=True))
        hours = [share * args.clip_hours * episodes / 100 / processes for episodes, processes in RECIPES.values()]
        table.append([title, f"{ratio(times, name, 'without')} of CLIP's step", *(f"{x:.1f}" for x in hours)])
        for mode in MODES[name]:
            sums[mode] = [a + b for a, b in zip(sums[mode], hours, strict=True)]
    hours = [seconds * episodes / 3600 / processes for episodes, processes in RECIPES.values()]
    table.append(["clustering, on the processor", f"{seconds:.0f} s, {memory:.0f} MB", *(f"{x:.1f}" for x in hours)])
    sums["episodic"] = [a + b for a, b in zip(sums["episodic"], hours, strict=True)]
    for mode, total in sums.items():
        clip = [args.clip_hours * episodes / 100 / processes for episodes, processes in RECIPES.values()]
        shares = [f"{x:.1f} ({x / y:.2f} of CLIP)" for x, y in zip(total, clip, strict=True)]
        table.append([f"**all, {mode}**", "", *shares])
    text = csv_table(f"{args.model}, batch {args.batch}, {machine('cpu')}", header, table)
    print(text)
    if args.rst:
        args.rst.write_text(text)


if __name__ == "__main__":
    main()
