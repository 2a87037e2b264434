"""The branch that an accelerator takes, where no decision may depend on a value, is as exact as the one of the CPU."""

import dense
import pytest
import torch
from cases import relative_error, unit, value_and_gradients

from protoclip_losses import _dtypes
from protoclip_losses.functional import info_nce

pytestmark = pytest.mark.cpu_only


def gradient_errors(scale):
    """Relative errors of the loss and of each gradient, of pairs whose loss is nearly 0."""
    image = torch.linalg.qr(unit(32, 32, 1))[0]
    text = torch.nn.functional.normalize(image + 0.05 * unit(32, 32, 2), dim=1)
    inputs = image.float(), text.float(), torch.tensor(scale)
    value, gradients = value_and_gradients(info_nce, *inputs)
    truth, wanted = value_and_gradients(dense.info_nce, *(x.double() for x in inputs))
    return float(truth), [relative_error(got, want) for got, want in zip([value, *gradients], [truth, *wanted], strict=True)]


@pytest.mark.parametrize("scale", [10.0, 18.0, 23.0])
def test_a_small_loss_keeps_the_digits_of_its_gradient(scale, monkeypatch):
    """0.6's branch for accelerators lost more digits than its CPU's: all of them at a loss of 1e-9."""
    loss, on_cpu = gradient_errors(scale)
    monkeypatch.setattr(_dtypes, "READABLE", set())
    _, on_accelerator = gradient_errors(scale)
    assert loss < 0.05
    assert max(on_cpu) < 5e-6
    assert max(on_accelerator) < 5e-6
