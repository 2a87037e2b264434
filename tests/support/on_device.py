"""``pytest --device cuda``: what tests make lies on that device, and the run ends in a report to paste.

Tests need not name the device. While a test of DEVICE_FOLDERS runs, and while its module is imported, a tensor that it makes is
made on the CPU, with the same numbers as there, and moved. What the library makes stays where the library puts it, as in a
user's program: a ``device=`` that it forgets is an error of mixed devices here, too.
"""

import datetime
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pretend_device
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import protoclip_losses

TESTS = f"{Path(__file__).parents[1]}/"
LIBRARY = f"{Path(protoclip_losses.__file__).parent}/"
DEVICE_FOLDERS = ("clustering", "episodes", "functional", "kernels", "losses", "prototypes")
DTYPES = ("float32", "bfloat16", "float16")
MADE = {*_device_constructors(), torch.from_numpy}
# Also the arrays that tests compare with NumPy's, faiss's and scikit-learn's.
AS_ARRAY = {torch.Tensor.numpy, torch.Tensor.__array__}


class MadeOn(TorchFunctionMode):
    """Tensors that tests make are on ``device``; None for the CPU, where they are made anyway."""

    def __init__(self):
        super().__init__()
        self.device = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device is None or not (function in MADE or function in AS_ARRAY) or not _is_of_a_test(sys._getframe(1)):
            return function(*args, **kwargs)
        if function in AS_ARRAY:
            return function(args[0].cpu(), *args[1:], **kwargs)
        if kwargs.get("device") is not None or any(isinstance(x, torch.Tensor) for x in args[:1]):
            return function(*args, **kwargs)
        needs_gradient = kwargs.pop("requires_grad", False)
        return function(*args, **kwargs).to(self.device).requires_grad_(needs_gradient)


def _is_of_a_test(frame):
    """Whether a test, or what tests share, calls torch here, perhaps through scikit-learn, and not the library."""
    while frame is not None and not frame.f_code.co_filename.startswith((TESTS, LIBRARY)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(TESTS)


MODE = MadeOn()


def pytest_addoption(parser):
    group = parser.getgroup("devices")
    group.addoption("--device", default="cpu", help="where the tensors of tests are: cpu, cuda, cuda:1 or pretended")
    group.addoption("--dtype", default=",".join(DTYPES), help="those of the tests that take any, separated by commas")


def pytest_configure(config):
    try:
        device = torch.device(config.getoption("device"))
    except RuntimeError:
        if config.getoption("device") != pretend_device.NAME:
            raise pytest.UsageError(
                f"--device must be cpu, cuda, cuda:N or {pretend_device.NAME}, got {config.getoption('device')!r}"
            ) from None
    if config.getoption("device") == pretend_device.NAME:
        if not pretend_device.is_possible():
            raise pytest.UsageError(
                f"--device {pretend_device.NAME}: torch {torch.__version__} is not a CPU build of 2.9 or later"
            )
        pretend_device.register()
        device = torch.device(pretend_device.NAME, 0)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device {device}: torch sees no CUDA device")
        if (device.index or 0) >= torch.cuda.device_count():
            raise pytest.UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    elif device.type not in ("cpu", pretend_device.NAME):
        raise pytest.UsageError(
            f"--device must be cpu, cuda, cuda:N or {pretend_device.NAME}, got {config.getoption('device')!r}"
        )
    wrong = set(config.getoption("dtype").split(",")) - {*DTYPES, "float64"}
    if wrong:
        raise pytest.UsageError(f"--dtype must be some of {', '.join(DTYPES)} and float64, got {', '.join(sorted(wrong))}")
    config.stash[DEVICE] = device
    if device.type != "cpu":
        MODE.__enter__()


DEVICE = pytest.StashKey()
NOT_RUN = pytest.StashKey()


def device_of(item_or_collector):
    """The device of the tensors that a test, or a module of tests, makes."""
    device = item_or_collector.config.stash[DEVICE]
    folders = Path(item_or_collector.path).parts
    return device if device.type != "cpu" and any(folder in folders for folder in DEVICE_FOLDERS) else None


def stays_on_cpu(item):
    """Whether a test has nothing to say of the device. Those marked ``gpu`` ask for it.

    A test of an error stays, too: wrong values raise asynchronously on a GPU, and a process cannot use it any more after that.
    Wrong types and shapes raise the same on every device.
    """
    if item.get_closest_marker("gpu"):
        return False
    if device_of(item) is None or any(item.get_closest_marker(mark) for mark in ("cpu_only", "distributed")):
        return True
    if device_of(item).type == pretend_device.NAME and any(word in item.nodeid for word in ("compile", "inference")):
        return True  # which a device in Python cannot do
    return "raises" in item.function.__code__.co_names


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    MODE.device = device_of(collector)
    try:
        return (yield)
    finally:
        MODE.device = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    MODE.device = device_of(item)
    try:
        return (yield)
    finally:
        MODE.device = None


def pytest_collection_modifyitems(config, items):
    on_cpu = config.stash[DEVICE].type == "cpu"
    left_out = [item for item in items if (item.get_closest_marker("gpu") if on_cpu else stays_on_cpu(item))]
    config.stash[NOT_RUN] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames and not any(
        "dtype" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        names = metafunc.config.getoption("dtype").split(",")
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)


@pytest.fixture(scope="session")
def device(request):
    """The device of ``--device``."""
    return request.config.stash[DEVICE]


def pytest_terminal_summary(terminalreporter, config):
    device = config.stash[DEVICE]
    if device.type == "cpu":
        return
    write, stats = terminalreporter.write_line, terminalreporter.stats
    counts = {name: len(stats.get(name, ())) for name in ("passed", "failed", "error", "skipped", "xfailed")}
    terminalreporter.section("report to paste")
    write(f"protoclip-losses {protoclip_losses.__version__}, {datetime.date.today():%Y-%m-%d}, pytest --device {device}")
    write(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {platform.platform()}")
    write(f"GPU: {gpu(device)}")
    write(
        ", ".join(f"{count} {name}" for name, count in counts.items())
        + f"; {config.stash[NOT_RUN]} not run: they stay on the CPU"
    )
    for name in ("failed", "error"):
        for report in stats.get(name, ()):
            write(f"{name}: {report.nodeid}")


def gpu(device):
    """The name, memory and driver of a GPU."""
    if device.type != "cuda":
        return "none, it is pretended"
    properties = torch.cuda.get_device_properties(device)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip() or driver
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}, driver {driver}"
