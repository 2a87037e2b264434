"""Prototypical back translation against a loop over clusters; at once, streamed, and saved in between."""

import dense
import pytest
import torch
from cases import assert_near, integers, leaf, unit
from helpers import in_new_process

from protoclip_losses import PrototypicalBackTranslation
from protoclip_losses.functional import back_translate


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


def test_module_is_the_function():
    labels, features = integers(4, 20), unit(20, 3)
    pbt = PrototypicalBackTranslation(5)
    prototypes, counts = back_translate(labels, features, 5)
    assert torch.equal(pbt(labels, features), prototypes)
    assert torch.equal(pbt.counts, counts)


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_streamed_equals_at_once(batch):
    labels, features = integers(4, 20), unit(20, 3)
    labels[5] = -1
    pbt = PrototypicalBackTranslation(5)
    for start in range(0, 20, batch):
        pbt.update(labels[start : start + batch], features[start : start + batch])
    prototypes, counts = back_translate(labels, features, 5)
    assert_near(pbt.compute(), prototypes)
    assert torch.equal(pbt.counts, counts)


def test_a_long_stream_of_float32_loses_no_digits():
    features = 1 + unit(256, 2, dtype=torch.float32)
    pbt = PrototypicalBackTranslation(1)
    for _ in range(300):
        pbt.update(torch.zeros(256, dtype=torch.int64), features)
    assert pbt.compute().dtype == torch.float32
    assert_near(pbt.compute()[0], features.double().mean(0), 1e-6)


def test_a_call_does_not_disturb_the_stream():
    labels, features = integers(4, 20), unit(20, 3)
    pbt = PrototypicalBackTranslation(4)
    pbt.update(labels[:10], features[:10])
    pbt(labels, -features)
    pbt.update(labels[10:], features[10:])
    assert_near(pbt.compute(), back_translate(labels, features, 4)[0])
    assert torch.equal(pbt.counts, back_translate(labels, features, 4)[1])


def test_reset_forgets_the_stream():
    labels, features = integers(4, 20), unit(20, 3)
    pbt = PrototypicalBackTranslation(4)
    pbt.update(labels, -features)
    pbt.reset()
    assert (pbt.counts == 0).all()
    pbt.update(labels, features)
    assert_near(pbt.compute(), back_translate(labels, features, 4)[0])


def test_counts_are_zero_before_anything_came():
    assert PrototypicalBackTranslation(3).counts.tolist() == [0, 0, 0]


CONTINUE = """
import sys, torch
from protoclip_losses import PrototypicalBackTranslation
given = torch.load(sys.argv[1], weights_only=True)
pbt = PrototypicalBackTranslation(4)
pbt.load_state_dict(given["state"], strict=True)
assert torch.equal(pbt.counts, given["counts"])
pbt.update(given["labels"], given["features"])
torch.save({"prototypes": pbt.compute(), "counts": pbt.counts}, sys.argv[2])
"""


def test_a_saved_stream_goes_on_in_a_new_process(tmp_path):
    labels, features = integers(4, 20), unit(20, 3)
    pbt = PrototypicalBackTranslation(4)
    pbt.update(labels[:9], features[:9])
    saved, done = tmp_path / "state.pt", tmp_path / "done.pt"
    torch.save({"state": pbt.state_dict(), "counts": pbt.counts, "labels": labels[9:], "features": features[9:]}, saved)
    in_new_process(CONTINUE, saved, done)
    pbt.update(labels[9:], features[9:])
    got = torch.load(done, weights_only=True)
    assert torch.equal(got["prototypes"], pbt.compute())
    assert torch.equal(got["counts"], pbt.counts)


def test_state_before_anything_came_can_be_saved_too():
    pbt = PrototypicalBackTranslation(3)
    pbt.update(torch.tensor([0]), unit(1, 2))
    pbt.load_state_dict(PrototypicalBackTranslation(3).state_dict())
    assert (pbt.counts == 0).all()
    pbt.update(torch.tensor([2]), unit(1, 4))
    assert pbt.counts.tolist() == [0, 0, 1]


def test_has_neither_parameters_nor_buffers():
    pbt = PrototypicalBackTranslation(3)
    pbt.update(torch.tensor([0]), unit(1, 2, dtype=torch.float32))
    before = pbt.compute()
    assert not list(pbt.parameters())
    assert not list(pbt.buffers())
    assert torch.equal(pbt.half().compute(), before)
