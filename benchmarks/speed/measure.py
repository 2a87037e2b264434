"""How everything here is measured: time interleaved in one process, as medians with ranges; memory in a new process each."""

import csv
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .gpu import describe

Call = Callable[[], object]


def interleaved(calls: Mapping[str, Call], *, repeats: int, device: str = "cpu", warm: bool = True) -> dict[str, list[float]]:
    """Milliseconds of each call, in the order A B C A B C ..., after one warm-up round that is not counted if ``warm``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False] * warm + [True] * repeats:
        for name, call in calls.items():
            took = milliseconds(call, device)
            if counted:
                times[name].append(took)
    return times


def milliseconds(call: Call, device: str = "cpu") -> float:
    """The time of one call, on a GPU that of its work there, launches included."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def ratio(times: Mapping[str, list[float]], a: str, b: str) -> str:
    """Median and range of a / b over the rounds, that is, over calls close to each other in time."""
    rounds = [x / y for x, y in zip(times[a], times[b], strict=True)]
    return f"{statistics.median(rounds):.2f} [{min(rounds):.2f}, {max(rounds):.2f}]"


def peak_extra_bytes(call: Call, device: str = "cpu") -> int:
    """Bytes by which one call raises this process's peak resident memory (on CUDA: peak allocated memory)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def free_bytes(device: str = "cpu") -> int:
    """Memory that is available without swapping."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def python_m(module: str, *arguments: str) -> list[str]:
    """The command ``python -m module arguments``, which finds modules where this process finds them.

    ``-P`` is passed on: without it the current folder comes first, and with it the library of this repository, where another
    version is being measured.
    """
    flags = ["-P"] if getattr(sys.flags, "safe_path", False) else []
    return [sys.executable, *flags, "-m", module, *arguments]


def in_new_process(module: str, *arguments: str) -> dict[str, float]:
    """Run a module and read the JSON object on the last line of its output: memory is measured where nothing else ran."""
    done = subprocess.run(python_m(module, *arguments), capture_output=True, text=True, check=True, env=os.environ)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def machine(device: str) -> str:
    """The hardware and the versions, as one line for the title of a table."""
    if device == "cuda":
        return describe()
    model = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?")
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def csv_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A csv-table for the documentation. At signs are escaped, or "R@10" would become a mail address."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(header), *map(list, rows)])
    body = "".join(f"   {line}\n" for line in text.getvalue().replace("@", r"\@").splitlines())
    return f".. csv-table:: {title}\n   :header-rows: 1\n   :class: small\n\n{body}\n"


def anonymous_bytes() -> int:
    """Memory of this process itself, without the pages of files that it has mapped: RssAnon."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_anonymous_bytes() -> list[int]:
    """A list whose one entry is the peak of :func:`anonymous_bytes` from now on, sampled every 5 ms."""
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    return peak
