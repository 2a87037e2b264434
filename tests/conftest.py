"""Fixtures that several files use."""

import pytest
from rank_cases import pytest_pycollect_makemodule  # noqa: F401

from protoclip_losses.kernels import blocks


@pytest.fixture(scope="module", params=["streamed", "dense"])
def form(request):
    """Logits of any size in blocks, then by the dense expression: tests are small, and would see only that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "DENSE_LOGITS", {"streamed": 0, "dense": 2**62}[request.param])
        yield request.param
