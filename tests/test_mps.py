"""What runs once an episode, and the metrics, keep to the dtypes that MPS has and give what the CPU gives (pretended tensors)."""

import pytest
import torch
from device_cases import CASES, IMAGE, K
from pretend_mps import NO_FLOAT64, PretendMPS, PretendTensor

from protoclip_losses import KMeans


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 has no autocast on MPS, not even to turn it off")
@pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_on_mps_are_those_on_the_cpu(case):
    on_cpu = case("cpu")
    with PretendMPS():
        on_mps = [x.cpu() for x in case("mps")]
    assert len(on_mps) == len(on_cpu) > 0
    for one, other in zip(on_mps, on_cpu, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_of_the_cpu_are_clustered_on_mps():
    expected = KMeans(K).fit(IMAGE)
    with PretendMPS():
        result = KMeans(K, device="mps").fit(IMAGE)
        assert not isinstance(result.labels, PretendTensor)
    assert torch.equal(result.labels, expected.labels)


def test_what_float32_cannot_square_is_an_error_on_mps():
    with PretendMPS(), pytest.raises(ValueError, match="x must be small enough for float32 to square it on mps:0, got 9"):
        KMeans(2).fit(1e20 * IMAGE.to("mps"))


def test_pretended_tensors_have_the_rules_of_mps():
    with PretendMPS():
        x = IMAGE.to("mps")
        assert (x.device.type, (x + 1).device.type, torch.zeros(3, device=x.device).device.type) == ("mps",) * 3
        assert x.cpu().device.type == x.to("cpu").device.type == "cpu"
        for wrong in (x.double, lambda: x.sum(dtype=torch.float64), lambda: torch.zeros(3, device="mps", dtype=torch.float64)):
            with pytest.raises(TypeError, match=NO_FLOAT64):
                wrong()
        with pytest.raises(RuntimeError, match="same device"):
            x + IMAGE
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
