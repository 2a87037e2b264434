"""Fixtures that several files use."""

import pytest
from rank_cases import pytest_pycollect_makemodule  # noqa: F401

from protoclip_losses.kernels import blocks
from protoclip_losses.prototypes import renewal


@pytest.fixture(scope="module", params=["streamed", "dense"])
def form(request):
    """Logits of any size in blocks, then by the dense expression: tests are small, and would see only that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "DENSE_LOGITS", {"streamed": 0, "dense": 2**62}[request.param])
        yield request.param


@pytest.fixture
def lost_centroids_stay(monkeypatch):
    """Online prototypes as those of 0.6, where a centroid that lost its members stayed where it was, without any."""
    monkeypatch.setattr(renewal, "draw_far_samples", lambda *_: {})
