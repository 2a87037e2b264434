"""Compare CLIP with ProtoCLIP: same encoders, augmentation, optimizer, schedule, samples and loader; only the arms differ.

    python -m benchmarks.comparison benchmarks/comparison/plans/final.json benchmarks/comparison/results/final.csv --jobs 2

A plan lists arms with their settings and seeds. A run trains one arm with one seed. When it is done it appends one row per
evaluated pass over the data to the table; runs that are in the table already are skipped, so the command can be interrupted
and repeated. `benchmarks.comparison.emoji_styles` makes the pictures first, `benchmarks.comparison.report` reads the table.
Several single-threaded processes (`--jobs`) have a higher throughput than one process with as many threads.
"""

import argparse
import csv
import fcntl
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import protoclip_losses

from ..speed.measure import machine
from .arms import Settings
from .data import DATA, file_of, plan_data
from .train import load_minilm, train

KEY = ("arm", "seed", "settings")
ABOUT = ("arm", "seed", "settings", "version", "machine", "finished")
CLOCK = ("pass", "samples", "wall_s", "cpu_s")
STAGES = tuple(f"cpu_{stage}_s" for stage in ("extraction", "clustering", "training", "back_translation", "loss"))
FIELDS = (*ABOUT, *CLOCK, *STAGES)  # and the columns of the data set


class Run(NamedTuple):
    """One training run: an arm with a seed. `changed` holds the settings that differ from the defaults."""

    arm: str
    seed: int
    changed: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.arm, str(self.seed), json.dumps(self.changed, sort_keys=True)


def read_plan(path: Path, arms: list[str] | None = None, seeds: list[int] | None = None) -> list[Run]:
    """The runs of a plan, ordered by seed, so that an unfinished table holds every arm for the same seeds.

    `arms` selects some of the plan's arms, `seeds` replaces the plan's seeds. Unknown arms and settings raise SystemExit.
    """
    plan = json.loads(path.read_text())
    default = asdict(Settings())
    if unknown := set(arms or ()) - plan["arms"].keys():
        raise SystemExit(f"{path}: arms must be among {sorted(plan['arms'])}, got {sorted(unknown)}")
    runs = []
    for arm, wanted in plan["arms"].items():
        if arms and arm not in arms:
            continue
        chosen = {**plan.get("common", {}), **wanted.get("settings", {})}
        if unknown := chosen.keys() - default.keys():
            raise SystemExit(f"{path}: settings of arm {arm!r} must be among {sorted(default)}, got {sorted(unknown)}")
        changed = {name: value for name, value in chosen.items() if value != default[name]}
        runs += [Run(arm, seed, changed) for seed in seeds or range(wanted.get("first_seed", 0), wanted["seeds"])]
    return sorted(runs, key=lambda run: run.seed)


def finished(table: Path) -> set[tuple[str, ...]]:
    """Keys of the runs in the table."""
    if not table.exists():
        return set()
    with table.open(newline="") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}


def append(table: Path, run: Run, rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Append the rows of a run, all or none and only once; safe with several processes writing to one table."""
    about = {
        **dict(zip(KEY, run.key, strict=True)),
        "version": protoclip_losses.__version__,
        "machine": machine("cpu"),
        "finished": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }
    with table.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if run.key in finished(table):
            return
        writer = csv.DictWriter(file, (*FIELDS, *columns))
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            short = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({**about, **short})


def run_one(run: Run, data: str, file: Path, table: Path) -> str:
    """Train and evaluate one run and append it to the table; return a line for the log."""
    torch.set_num_threads(1)
    rows = list(train(Settings(**run.changed), run.seed, file, DATA[data]))
    append(table, run, rows, DATA[data].columns)
    last = rows[-1]
    shown = ("zero_shot_group", "zero_shot_subgroup", "linear_probe_group", "image_to_text_recall@5", "ami_subgroup")
    figures = ", ".join(f"{name} {last[f'validation/{name}']:.3f}" for name in shown if f"validation/{name}" in last)
    return f"{run.arm} {run.seed}: {last.get('cpu_s', 0):.0f} s CPU, {last.get('wall_s', 0):.0f} s wall; validation {figures}"


def needs_minilm(settings: Settings) -> bool:
    """Whether an arm has a teacher that is a pretrained model."""
    return settings.teacher != "words" and (settings.w_external > 0 or settings.distill != "none")


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("plan", type=Path)
    p.add_argument("table", type=Path, help="CSV file to append the rows to")
    p.add_argument("--data", type=Path, help="file of the pictures; without it runs/emoji.npz, or the other data set of the plan")
    p.add_argument("--arms", nargs="+", help="run only these arms of the plan")
    p.add_argument("--seeds", type=int, nargs="+", help="use these seeds, not the plan's")
    p.add_argument("--jobs", type=int, default=1, help="number of runs in parallel, one thread each")
    args = p.parse_args()
    runs = read_plan(args.plan, args.arms, args.seeds)
    args.table.parent.mkdir(parents=True, exist_ok=True)
    done = finished(args.table)
    pending = [run for run in runs if run.key not in done]
    print(f"{len(runs)} runs planned, {len(pending)} left", flush=True)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(Settings(**run.changed).precision == "bf16" for run in pending):
        print(
            "warning: this processor has no products of bfloat16, in which image encoders run: a step takes many times as "
            'long. "precision": "fp32" in the plan\'s settings runs them in float32, for all arms that are compared',
            flush=True,
        )
    data = plan_data(json.loads(args.plan.read_text()))
    file = file_of(data, args.data)
    if any(needs_minilm(Settings(**run.changed)) for run in pending):
        # Encode the captions once, before there are several processes that would all do it.
        pairs = DATA[data].load(file)
        load_minilm(list(pairs.subset(DATA[data].splits(pairs)["train"]).captions), file)
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the workers read this when they start
    start = time.time()
    # Spawn: a forked process would inherit torch's thread pools in an undefined state.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_one, run, data, file, args.table) for run in pending]
        for number, future in enumerate(as_completed(futures), 1):
            hours = (time.time() - start) / 3600
            print(f"{time.strftime('%H:%M')} {number}/{len(pending)}, {hours:.1f} h: {future.result()}", flush=True)


if __name__ == "__main__":
    main()
