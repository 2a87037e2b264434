"""Fixtures that several files use."""

import warnings

import pytest
from cases import set_sizes
from on_device import (  # noqa: F401
    device,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_generate_tests,
    pytest_make_collect_report,
    pytest_runtest_protocol,
    pytest_terminal_summary,
)
from rank_cases import pytest_pycollect_makemodule  # noqa: F401

from protoclip_losses import _checks, _dtypes
from protoclip_losses.prototypes import renewal


@pytest.fixture(scope="module", params=["streamed", "accelerator", "dense"])
def form(request):
    """Logits of any size in blocks, as on a CPU and as on an accelerator, where no branch depends on values; then densely."""
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch, dense_logits=2**62 if request.param == "dense" else 0)
        if request.param == "accelerator":
            patch.setattr(_dtypes, "READABLE", set())
        yield request.param


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    """What is said once in a process is said once in each test."""
    monkeypatch.setattr(_checks, "SAID", set())


@pytest.fixture
def said():
    """The messages of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught]


@pytest.fixture
def lost_centroids_stay(monkeypatch):
    """Online prototypes as those of 0.6, where a centroid that lost its members stayed where it was, without any."""
    monkeypatch.setattr(renewal, "draw_far_samples", lambda *_: {})
