"""Prototypical back translation against a loop over clusters: the function, and the module that also streams."""

import dense
import pytest
import torch
from cases import assert_near, integers, leaf, unit
from helpers import in_new_process

from protoclip_losses import PrototypicalBackTranslation
from protoclip_losses.functional import back_translate

K = 9
LABELS, FEATURES = integers(K - 1, 100) - 1, unit(100, 4, 1, torch.float32)  # some are -1, and none is in the last two


def streamed(features=FEATURES, batch=30, labels=LABELS):
    pbt = PrototypicalBackTranslation(K)
    for a, h in zip(labels.split(batch), features.split(batch), strict=True):
        pbt.update(a, h)
    return pbt


@pytest.mark.parametrize(("samples", "prototypes", "width"), [(50, 6, 4), (1, 1, 1), (3, 10, 2), (40, 1, 3), (0, 3, 2)])
def test_prototypes_are_means_of_the_students_own_features(samples, prototypes, width):
    labels, features = integers(prototypes, samples), unit(samples, width)
    got, counts = back_translate(labels, features, prototypes)
    want, true_counts = dense.back_translate(labels, features, prototypes)
    assert_near(got, want)
    assert torch.equal(counts, true_counts)


def test_an_empty_cluster_is_a_zero_row_with_count_zero():
    prototypes, counts = back_translate(torch.tensor([0, 0, 3]), unit(3, 2), 5)
    assert counts.tolist() == [2, 0, 0, 1, 0]
    assert (prototypes[counts == 0] == 0).all()


def test_label_minus_one_is_left_out_even_where_its_row_is_nan():
    labels, features = integers(4, 20), unit(20, 3)
    labels[[2, 7, 19]] = -1
    want, counts = dense.back_translate(labels, features, 4)
    features[[2, 7]], features[19] = float("nan"), float("inf")
    got, got_counts = back_translate(labels, features, 4)
    assert_near(got, want)
    assert torch.equal(got_counts, counts)


def test_with_every_row_left_out_all_clusters_are_empty():
    prototypes, counts = back_translate(torch.tensor([-1, -1]), unit(2, 3), 4)
    assert (prototypes == 0).all()
    assert (counts == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_kept_in_at_least_float32(dtype):
    features = (1 + unit(5000, 3)).to(dtype)  # a float16 sum of 5000 ones would be off by units
    got, _ = back_translate(integers(2, 5000), features, 2)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, dense.back_translate(integers(2, 5000), features, 2)[0], 1e-5 if dtype != torch.float64 else 1e-12)


def test_same_input_same_bits():
    labels, features = integers(50, 20000), unit(20000, 8, dtype=torch.float32)
    first = back_translate(labels, features, 50)[0]
    assert all(torch.equal(first, back_translate(labels, features, 50)[0]) for _ in range(3))


def test_result_is_a_constant_and_strides_do_not_matter():
    features, labels = unit(4, 20), torch.stack([integers(3, 20)] * 2, 1)[:, 0]
    prototypes, _ = back_translate(labels, leaf(features).T, 3)
    assert not prototypes.requires_grad
    assert_near(prototypes, dense.back_translate(labels, features.T, 3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_call_is_the_function(dtype):
    features, pbt = FEATURES.to(dtype), PrototypicalBackTranslation(K)
    prototypes, counts = back_translate(LABELS, features, K)
    assert torch.equal(pbt(LABELS, features), prototypes)
    assert torch.equal(pbt.counts, counts)


@pytest.mark.parametrize("batch", [1, 3, 7, 30, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_streamed_is_the_same_as_at_once(batch, dtype):
    features = FEATURES.to(dtype)
    pbt = streamed(features, batch)
    prototypes, counts = dense.back_translate(LABELS, features, K)
    got = pbt.compute()
    assert got.dtype == PrototypicalBackTranslation(K)(LABELS, features).dtype
    assert_near(got, prototypes, 1e-6 if dtype != torch.float64 else 1e-14)
    assert torch.equal(pbt.counts, counts)
    assert torch.equal(pbt.compute(), got)


def test_a_long_stream_keeps_its_digits():
    """A float32 running sum would stop growing at 2**24."""
    pbt = PrototypicalBackTranslation(1)
    pbt.update(torch.tensor([0]), torch.tensor([[2.0**25]]))
    for _ in range(100):
        pbt.update(torch.tensor([0]), torch.tensor([[1.0]]))
    assert float(pbt.compute()) == pytest.approx((2**25 + 100) / 101, rel=1e-7)


def test_a_long_stream_of_float32_loses_no_digits():
    features = 1 + unit(256, 2, dtype=torch.float32)
    pbt = PrototypicalBackTranslation(1)
    for _ in range(300):
        pbt.update(torch.zeros(256, dtype=torch.int64), features)
    assert pbt.compute().dtype == torch.float32
    assert_near(pbt.compute()[0], features.double().mean(0), 1e-6)


def test_counts_say_which_rows_are_empty():
    pbt = PrototypicalBackTranslation(4)
    assert pbt.counts.tolist() == [0, 0, 0, 0]
    pbt.update(torch.tensor([2, -1, 2]), torch.ones(3, 2))
    assert pbt.counts.tolist() == [0, 0, 2, 0]
    assert pbt.counts.dtype == torch.int64
    pbt.update(torch.tensor([0]), torch.ones(1, 2))
    assert pbt.counts.tolist() == [1, 0, 2, 0]
    assert pbt.compute().tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_a_call_does_not_touch_what_was_streamed():
    pbt = streamed()
    before = pbt.compute()
    pbt(torch.tensor([0, 1]), torch.ones(2, 4))
    assert pbt.counts.tolist() == [1, 1] + [0] * (K - 2)
    assert torch.equal(pbt.compute(), before)
    pbt.update(torch.tensor([-1]), torch.ones(1, 4))
    assert torch.equal(pbt.counts, streamed().counts)


def test_a_call_does_not_disturb_the_stream():
    labels, features = integers(4, 20), unit(20, 3)
    pbt = PrototypicalBackTranslation(4)
    pbt.update(labels[:10], features[:10])
    pbt(labels, -features)
    pbt.update(labels[10:], features[10:])
    assert_near(pbt.compute(), back_translate(labels, features, 4)[0])
    assert torch.equal(pbt.counts, back_translate(labels, features, 4)[1])


def test_reset_forgets():
    pbt = streamed()
    pbt.reset()
    assert pbt.counts.tolist() == [0] * K
    with pytest.raises(ValueError, match="compute needs at least one update"):
        pbt.compute()
    pbt.update(torch.tensor([1]), torch.full((1, 2), 3.0))  # another width is fine now
    assert pbt.compute()[1].tolist() == [3, 3]


def test_reset_forgets_the_stream():
    labels, features = integers(4, 20), unit(20, 3)
    pbt = PrototypicalBackTranslation(4)
    pbt.update(labels, -features)
    pbt.reset()
    assert (pbt.counts == 0).all()
    pbt.update(labels, features)
    assert_near(pbt.compute(), back_translate(labels, features, 4)[0])


def test_reset_forgets_the_type_too():
    pbt = streamed(FEATURES.double())
    pbt.reset()
    assert pbt.get_extra_state()["dtype"] == "float32"


def test_prototypes_are_constants():
    features = FEATURES.clone().requires_grad_()
    pbt = PrototypicalBackTranslation(K)
    assert not pbt(LABELS, features).requires_grad
    pbt.update(LABELS, features)
    assert not pbt.compute().requires_grad


def test_it_has_no_tensors_that_a_model_would_carry():
    pbt = streamed()
    before = pbt.compute()
    assert list(pbt.parameters()) == list(pbt.buffers()) == []
    assert torch.equal(pbt.half().compute(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_stream_goes_on_in_a_new_process(tmp_path, dtype):
    features = FEATURES.to(dtype)
    pbt = streamed(features[:60], labels=LABELS[:60])
    torch.save({"pbt": pbt.state_dict(), "rest": (LABELS[60:], features[60:])}, tmp_path / "half.pt")
    in_new_process(
        """
import sys, torch
from protoclip_losses import PrototypicalBackTranslation
saved = torch.load(sys.argv[1] + "/half.pt", weights_only=True)
pbt = PrototypicalBackTranslation(9)
pbt.load_state_dict(saved["pbt"], strict=True)
loaded = pbt.counts
pbt.update(*saved["rest"])
torch.save({"loaded": loaded, "prototypes": pbt.compute(), "counts": pbt.counts}, sys.argv[1] + "/whole.pt")
""",
        tmp_path,
    )
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert torch.equal(whole["loaded"], pbt.counts)
    pbt.update(LABELS[60:], features[60:])
    assert whole["prototypes"].dtype == dtype
    assert torch.equal(whole["prototypes"], pbt.compute())
    assert torch.equal(whole["counts"], pbt.counts)


def test_an_unused_stream_can_be_saved_and_loaded():
    pbt = streamed()
    pbt.load_state_dict(PrototypicalBackTranslation(K).state_dict())
    assert pbt.counts.tolist() == [0] * K
    with pytest.raises(ValueError, match="compute needs"):
        pbt.compute()
    pbt.update(torch.tensor([2]), unit(1, 3))  # another width is fine now
    assert pbt.counts.tolist() == [0, 0, 1] + [0] * (K - 3)


def test_the_state_of_another_number_of_prototypes_is_an_error():
    with pytest.raises(ValueError, match=r"counts must have 3 entries as num_prototypes, got 9"):
        PrototypicalBackTranslation(3).load_state_dict(streamed().state_dict())


@pytest.mark.parametrize(
    ("labels", "features", "error", "message"),
    [
        (torch.tensor([0, K]), FEATURES[:2], ValueError, rf"labels must lie in \[0, {K}\) or be -1, got {K} at position 1"),
        (torch.tensor([-2, 0]), FEATURES[:2], ValueError, "got -2 at position 0"),
        (torch.tensor([0.0, 1.0]), FEATURES[:2], TypeError, "labels must be int64"),
        (torch.tensor([0]), FEATURES[:2], ValueError, "labels must have 2 entries as features has rows"),
        (torch.tensor([0, 1]), FEATURES[0], ValueError, "features must have 2 dimensions"),
        (torch.tensor([0, 1]), FEATURES[:2].long(), TypeError, "features must be float16"),
        (torch.tensor([0, 1]), FEATURES[:2] * torch.nan, ValueError, "features must be finite"),
    ],
)
def test_bad_batches_are_named_and_not_counted(labels, features, error, message):
    pbt = streamed()
    with pytest.raises(error, match=message):
        pbt.update(labels, features)
    with pytest.raises(error, match=message):
        pbt(labels, features)
    assert torch.equal(pbt.compute(), streamed().compute())


def test_another_width_than_before_is_an_error():
    with pytest.raises(ValueError, match=r"features must have width 4 as before, got shape \(2, 3\)"):
        streamed().update(torch.tensor([0, 1]), torch.ones(2, 3))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError)])
def test_a_bad_number_of_prototypes_is_named(value, error):
    with pytest.raises(error, match="num_prototypes must be"):
        PrototypicalBackTranslation(value)


@pytest.mark.parametrize("stream", [False, True])
def test_the_mean_of_four_million_equal_rows_is_that_row(stream):
    """Summed one after the other in float32 they gave 0.0961."""
    labels, features = torch.zeros(4_000_000, dtype=torch.int64), torch.full((4_000_000, 1), 0.1)
    if stream:
        pbt = PrototypicalBackTranslation(1)
        pbt.update(labels, features)
        prototypes = pbt.compute()
    else:
        prototypes, _ = back_translate(labels, features, 1)
    assert prototypes.dtype == torch.float32
    assert float(prototypes) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=["float64", "as on MPS"])
@pytest.mark.parametrize("rows", [31, 32, 33, 1025, 40_000])
def test_sums_of_any_number_of_rows_keep_the_digits_of_float32(rows, wide, monkeypatch):
    """MPS has no float64: sums of sums of few rows take its place."""
    monkeypatch.setattr("protoclip_losses.functional.back_translation.sum_dtype", lambda device: wide)
    labels = torch.cat([torch.zeros(rows, dtype=torch.int64), integers(5, 50) - 1])[torch.randperm(rows + 50)]
    features = 1 + 0.01 * unit(rows + 50, 3, 2, torch.float32)
    got, counts = back_translate(labels, features, 5)
    want, true_counts = dense.back_translate(labels, features.double(), 5)
    assert (got - want).abs().max() < 3e-7
    assert torch.equal(counts, true_counts)
