"""Time, memory and error of the losses, compared with the dense expression, open_clip and the matrix products alone.

    python -m benchmarks.speed.losses                  # the table, about 10 minutes on 2 cores
    python -m benchmarks.speed.losses --large          # sizes that fit in memory with this library only: minutes per call
    python -m benchmarks.speed.losses --device cuda    # the same on a GPU and larger, in ten minutes, with a report to paste
    python -m benchmarks.speed.losses --csv out.csv    # also write the rows to a file, as benchmarks.speed.curves needs them

Losses are forward + backward with gradients for features and scale, timed in the order A B C A B C in one process. The error is
that of the call that is timed, against a float64 evaluation of the formula. Memory is the increase of the process's peak during
one call, with a new process for each; on a GPU that of the memory torch allocated there. Other libraries are measured where they
are installed (open_clip; on a GPU liger-kernel, cut-cross-entropy, inf-cl). "compiled" is our call under
torch.compile(fullgraph=True), "torch" is F.linear_cross_entropy with options (torch 2.13 or later, hard targets). "floor" is a
lower bound: the matrix products alone; "floor+softmax" has the one pass of a softmax too. Calls that would not fit in free memory
are skipped.

To measure another version of the library, put the folder that contains its protoclip_losses first, and keep Python (3.11 or
later) from putting the current folder before it:

    PYTHONPATH=../other-version:. python -P -m benchmarks.speed.losses
"""

import argparse
import csv
import json
import statistics
import time
from math import inf
from pathlib import Path

import protoclip_losses

from . import gpu
from .cases import Case, Results, make
from .measure import csv_table, free_bytes, in_new_process, interleaved, machine, peak_extra_bytes, ratio

CASES = (
    "soft/float32/4096/20000/128",
    "hard/float32/4096/20000/128",
    "soft/bfloat16/4096/20000/128",
    "hard/bfloat16/4096/20000/128",
    "hard/float32/256/512/128",
    "soft/float32/256/512/128",
    "mixture/float32/4096/20000/128",
    "module/float32/64/20000/128",
    "pairs/8192/512",
    "pairs/256/512",
    "pbt/200000/20000/128",
    "targets/4096/128",
)
ON_A_GPU = ("hard/bfloat16/65536/512/128", "pairs/32768/512")  # more than the CPU's: there they take minutes
HEADER = ["case", "call", "median ms [min, max]", "ours / it", "peak extra MB", "relative error"]
LARGE = ("soft/float32/65536/20000/128", "pairs/65536/512", "targets/50000/128")


def error(ours: Results, truth: Results) -> float:
    """Largest error in loss and gradients, each relative to the largest entry of the float64 result."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True))


def small(name: str) -> str:
    """The same case at a tiny size, as a warm-up: thread pools and lazy imports must not count as memory of the call."""
    kind, *rest = name.split("/")
    return "/".join([kind, *("64" if x.isdigit() else x for x in rest)])


def memory(name: str, call: str, device: str) -> str:
    """Megabytes by which one call raises the peak of a new process."""
    if device == "cuda":  # its allocator knows the peak of one call, and a new process starts CUDA in seconds
        return f"{peak_extra_bytes(make(name, device).calls()[call], device) / 2**20:.0f}"
    result = in_new_process("benchmarks.speed.losses", "--device", device, "--memory-of", name, call)
    return f"{result['bytes'] / 2**20:.0f}"


def fitting(case: Case, device: str, only: list[str] | None) -> list[str]:
    """The calls that fit in free memory."""
    return [c for c in case.calls() if case.bytes_of(c) < 0.8 * free_bytes(device) and (not only or c in only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="kind/dtype/B/K/D, pairs/B/d, pbt/N/K/D or targets/K/D")
    parser.add_argument("--calls", nargs="*", help="only these calls of each case, such as ours, dense, floor")
    parser.add_argument("--large", action="store_true", help=f"the cases {' '.join(LARGE)}, our call only, once")
    parser.add_argument("--rst", help="also write the table to this RST file, which the documentation includes")
    parser.add_argument("--csv", help="also write the rows of the table to this CSV file")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CALL"), help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, help="start no case after these; default: 10 with --device cuda, else no limit")
    args = parser.parse_args()
    gpu.require(args.device)
    on_gpu = args.device == "cuda"
    deadline = time.monotonic() + 60 * (args.minutes or (10 if on_gpu else inf))
    if args.memory_of:
        name, call = args.memory_of
        case = make(name, args.device)
        make(small(name), args.device).calls()[call]()
        print(json.dumps({"bytes": peak_extra_bytes(case.calls()[call], args.device)}))
        return
    names = args.cases or (LARGE if args.large else CASES + ON_A_GPU * on_gpu)
    only, repeats = (["ours"], 1) if args.large else (args.calls, args.repeats)
    print(f"protoclip_losses {protoclip_losses.__version__} in {Path(protoclip_losses.__file__).parent}")
    print(machine(args.device))
    print(f"| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
    rows: list[list[str]] = []
    notes = gpu.missing(["open_clip", *(["liger_kernel", "cut_cross_entropy", "inf_cl"] if on_gpu else [])])
    for name in names:
        if time.monotonic() > deadline:
            notes.append(f"{name} is left out: the time is over, --minutes gives more")
            continue
        case = make(name, args.device)
        chosen = fitting(case, args.device, only)
        calls = {call: function for call, function in case.calls().items() if call in chosen}
        if on_gpu:
            calls, failed = gpu.that_run(calls)
            notes += [f"{name}: {sentence}" for sentence in failed]
        quick = "/256/" in name
        times = interleaved(calls, repeats=repeats * (40 if quick else 1), device=args.device, warm=not args.large)
        truth = None if args.large else case.truth()
        for call, ms in times.items():
            measured = not call.startswith("floor")
            peak = memory(name, call, args.device) if measured and call != "compiled" else ""
            wrong = f"{error(calls[call](), truth):.1e}" if measured and truth else ""  # type: ignore[arg-type]
            median = f"{statistics.median(ms):.3g} [{min(ms):.3g}, {max(ms):.3g}]"
            rows.append([name, call, median, ratio(times, "ours", call), peak, wrong])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
        del case, calls, truth
    if on_gpu:
        print(gpu.report("benchmarks.speed.losses --device cuda", protoclip_losses.__version__, HEADER, rows, notes))
    else:
        notes.append(
            "Without --device cuda the rows of the Triton kernels (liger-kernel, cut-cross-entropy, inf-cl) are left out"
        )
        print("\n".join(notes))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            file.write(f"# {machine(args.device)}\n")
            csv.writer(file).writerows([HEADER, *rows])
    if args.rst:
        Path(args.rst).write_text(csv_table(machine(args.device), HEADER, rows))


if __name__ == "__main__":
    main()
