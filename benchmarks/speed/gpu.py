"""What the benchmarks need on a GPU: its name for a report, peers that may be installed, and calls that do not run left out."""

import datetime
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

PEERS = {  # module: what to install
    "open_clip": "open_clip_torch",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "inf_cl": "inf-cl",
    "flash_kmeans": "flash-kmeans",
}
Function = TypeVar("Function", bound=Callable[..., object])


def require(device: str) -> None:
    """End the program with a sentence if torch cannot use the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")


def describe() -> str:
    """GPU, driver and versions, as one line."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or driver
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, float32 products: {torch.get_float32_matmul_precision()}, Python {platform.python_version()}"
    )


def missing(modules: Sequence[str]) -> list[str]:
    """A sentence for each of these peers that is not installed."""
    return [
        f"{PEERS[name]} is not installed: its rows are left out" for name in modules if importlib.util.find_spec(name) is None
    ]


def that_run(calls: Mapping[str, Function], *arguments: object) -> tuple[dict[str, Function], list[str]]:
    """The calls that do not raise here, and a sentence for each other one: a peer may not know this GPU or torch. Ours must."""
    running: dict[str, Function] = {}
    notes = []
    for name, call in calls.items():
        try:
            call(*arguments)
            torch.cuda.synchronize()
            running[name] = call
        except Exception as error:
            if name in ("ours", "torch"):
                raise
            reason = (str(error).strip() or "no message").splitlines()[0][:150]
            notes.append(f"{name} is left out: {type(error).__name__}: {reason}")
    return running, notes


def report(command: str, version: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """All that is known of a run, to be pasted."""
    table = [header, ["---"] * len(header), *rows]
    lines = [
        f"protoclip-losses {version}, {datetime.date.today():%Y-%m-%d}, python -m {command}",
        f"{describe()}, {platform.platform()}",
        "",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        *dict.fromkeys(notes),
    ]
    return "\n=== report to paste\n" + "\n".join(lines)
