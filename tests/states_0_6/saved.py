"""Reading the states and facts in this folder, and comparing facts."""

from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent


def read(name: str) -> Any:
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def assert_facts(got: dict[str, Any], wanted: dict[str, Any], exact: bool = False) -> None:
    """Facts are equal where nothing rounds, and else within the rounding of another machine or version of PyTorch."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if not isinstance(value, torch.Tensor):
            assert got[name] == (value if exact else pytest.approx(value, rel=2e-6)), name
        elif exact or not value.is_floating_point():
            assert got[name].dtype == value.dtype, name
            assert torch.equal(got[name], value), name
        else:
            torch.testing.assert_close(got[name], value, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
