"""K-means of an episode makes no second copy of its features: measured on a process of its own, by what is resident in it."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.cpu_only

SCRIPT = """
import torch
from pathlib import Path
from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans

def status(field):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1]) / 1024

torch.set_num_threads(1)
ROWS, WIDTH = 300_000, 128
bank = FeatureBank(torch.arange(ROWS), dim=WIDTH, dtype=torch.float16)
generator = torch.Generator().manual_seed(0)
for index in torch.arange(ROWS).split(20_000):
    bank.update(index, *(torch.randn(len(index), WIDTH, generator=generator).half() for _ in range(2)))
result = KMeans(300, niter=1).fit(bank.features["image"][:1000].clone())  # thread pools and lazy imports
result.predict(bank.features["image"][:1000], 3)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
CALL
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "call",
    [
        'KMeans(64, niter=2, max_dropped=0).fit(bank.features["image"])',
        "EpisodicClusterer(64, niter=2).build(bank)",
        'result.predict(bank.features["image"], 3)',  # N x K would be 343 MB
    ],
)
def test_features_are_not_copied(call):
    """A copy of a modality in float32 would be 146 MB, one in float16 73; labels, scores, bounds, sorts are up to 64."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed is given back, so that resident is in use
    command = [sys.executable, "-c", SCRIPT.replace("CALL", call)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert float(done.stdout) < 72


LARGE = """
import sys
import numpy as np
import torch
from pathlib import Path
from protoclip_losses import KMeans

def status(field):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1]) / 1024

torch.set_num_threads(1)
rows = np.load(sys.argv[1], mmap_mode="r")
KMeans(8, niter=1).fit(rows[:1000])  # thread pools and lazy imports
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
KMeans(8, niter=1).fit(rows)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_of_a_file_take_few_bytes_each(tmp_path):
    """Between iterations 16 bytes; 1.5 million rows take 24 MB of the file and 40 MB at 25 bytes each, and blocks come on top."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((1_500_000, 8), dtype=np.float32).astype(np.float16))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", LARGE, str(tmp_path / "rows.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert float(done.stdout) < 110
