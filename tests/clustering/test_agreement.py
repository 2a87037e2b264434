"""Adjusted Rand index and adjusted mutual information against scikit-learn, against exact integers, and by their memory."""

import json
import math
import sys
from fractions import Fraction

import pytest
import sklearn.metrics
import torch
from cases import integers
from helpers import in_new_process, seeded

from protoclip_losses.clustering import adjusted_mutual_info_score, adjusted_rand_score, agreement
from protoclip_losses.clustering.agreement import adjusted_agreement

ODD = {
    "one cluster": lambda n: torch.zeros(n, dtype=torch.int64),
    "a cluster each": lambda n: torch.arange(n),
    "a cluster each but one": lambda n: torch.arange(n).clamp(max=max(n - 2, 0)),
    "pairs": lambda n: torch.arange(n) // 2,
    "three": lambda n: integers(3, n, 1),
    "many": lambda n: integers(n, n, 2),
    "a large one": lambda n: (torch.arange(n) - n * 9 // 10).clamp(min=0),
    "hashes": lambda n: integers(4, n, 3) * 10**18 + 7,
}


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("first", ODD)
def test_odd_labelings_score_as_in_scikit_learn(samples, first):
    if samples == 2 and tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 5):
        pytest.skip("scikit-learn 1.4 gives 0 for two samples in a cluster each, compared with themselves")
    a = ODD[first](samples)
    for second in ODD.values():
        b = second(samples)
        assert adjusted_rand_score(a, b) == pytest.approx(sklearn.metrics.adjusted_rand_score(a, b), abs=1e-10)
        assert adjusted_mutual_info_score(a, b) == pytest.approx(sklearn.metrics.adjusted_mutual_info_score(a, b), abs=1e-10)


@pytest.mark.parametrize(
    ("samples", "first", "second"), [(1000, 7, 30), (3000, 100, 120), (5000, 2, 2), (4000, 1000, 3), (20_000, 40, 400)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_random_labelings_score_as_in_scikit_learn(samples, first, second, dtype):
    a = integers(first, samples, 1)
    b = (3 * a + integers(2, samples, 2)) % second
    if dtype == torch.uint8:
        a, b = a % 250, b % 250
    got = adjusted_rand_score(a.to(dtype), b.to(dtype)), adjusted_mutual_info_score(a.to(dtype), b.to(dtype))
    want = sklearn.metrics.adjusted_rand_score(a, b), sklearn.metrics.adjusted_mutual_info_score(a, b)
    assert got == pytest.approx(want, abs=1e-10)
    assert adjusted_agreement(a, b) == got
    assert (adjusted_rand_score(b, a), adjusted_mutual_info_score(b, a)) == pytest.approx(got, abs=1e-12)


def test_minus_one_leaves_a_sample_out_of_both():
    a, b = integers(5, 300, 1) - 1, integers(4, 300, 2) - 1
    known = (a >= 0) & (b >= 0)
    for score in (adjusted_rand_score, adjusted_mutual_info_score):
        assert score(a, b) == score(a[known], b[known])
        assert score(a, a) == 1
        assert score(torch.full((3,), -1), torch.arange(3)) == 1  # as scikit-learn has it for no sample


def test_one_cluster_and_a_cluster_each_say_nothing_at_any_size():
    """The exact value; both sides of the quotient are rounding errors, and scikit-learn's is 1e-3 here."""
    each, but_one = torch.arange(20_000), torch.arange(20_000).clamp(max=19_998)
    assert adjusted_mutual_info_score(each, but_one) == adjusted_mutual_info_score(but_one, each) == 0
    assert adjusted_mutual_info_score(torch.zeros_like(each), but_one) == 0
    assert adjusted_rand_score(each, but_one) == 0


def exact_expectation(a, b):
    """Expected mutual information in exact integers, but for the logarithm."""
    total = sum(a)
    terms = (
        float(Fraction(k * math.comb(x, k) * math.comb(total - x, y - k), total * math.comb(total, y)))
        * math.log(total * k / (x * y))
        for x in a
        for y in b
        for k in range(max(1, x + y - total), min(x, y) + 1)
    )
    return math.fsum(terms)


@pytest.mark.parametrize("block", [7, 2**16])
@pytest.mark.parametrize(
    ("a", "b"), [([1900, 60, 40], [1000, 900, 100]), ([500] * 4, [1] * 50 + [1950]), ([1999, 1], [3, 1997]), ([2, 3], [4, 1])]
)
def test_expected_information_is_exact_in_blocks_of_any_length(a, b, block, monkeypatch):
    """Sizes up to 2000 are beyond the reach within which overlaps are summed, so that this measures what is left out too."""
    monkeypatch.setattr(agreement, "BLOCK_TERMS", block)
    sizes = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    got = agreement._expected_information(*sizes, torch.tensor(float(sum(a)), dtype=torch.float64))
    assert float(got) == pytest.approx(exact_expectation(a, b), rel=1e-11, abs=1e-14)


def plain_expectation(a, b, total):
    """What 0.6 computed: every overlap of each pair of sizes at once."""
    expected = total.new_zeros(())
    for size in a:
        overlap = torch.arange(1, int(size) + 1, dtype=torch.float64)[:, None]
        possible = (overlap <= b) & (total - size - b + overlap >= 0)
        choose = agreement._log_choose
        chance = choose(size, overlap) + choose(total - size, (b - overlap).clamp(min=0)) - choose(total, b)
        value = overlap / total * (total * overlap / (size * b)).log() * chance.exp()
        expected += value.where(possible, 0).sum()
    return expected


@pytest.mark.parametrize("rows", [3000, 30_000])
def test_expected_information_is_that_of_0_6(rows):
    a = torch.bincount((torch.rand(rows, generator=seeded(0)) ** 4 * 20).long()).double()
    b = torch.bincount(torch.where(torch.rand(rows, generator=seeded(1)) < 0.7, 0, integers(30, rows, 2) + 1)).double()
    total = a.sum()
    assert float(agreement._expected_information(a, b, total)) == pytest.approx(float(plain_expectation(a, b, total)), abs=1e-12)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_where_one_cluster_holds_most_of_the_samples():
    """0.6 took the largest size times the number of different ones: 0.4 GB for 100,000 samples, 9 GB for a million.

    Here each size of 300 leaves 2600 overlaps with the large cluster: 60 MB and more if they were not worked on in blocks.
    """
    megabytes = json.loads(
        in_new_process(
            """
import torch
from pathlib import Path
from protoclip_losses.clustering.agreement import _expected_information

def status(field):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1]) / 1024

torch.set_num_threads(1)
small, total = torch.arange(10_000, 10_300).double(), torch.tensor(1e8, dtype=torch.float64)
a, b = (torch.cat([sizes, (total - sizes.sum())[None]]) for sizes in (small, small + 7))
_expected_information(small[:5], small[:5], small[:5].sum())
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
_expected_information(a, b, total)
print(status("VmHWM") - before)
"""
        )
    )
    assert megabytes < 16


X = torch.arange(4)


@pytest.mark.parametrize("score", [adjusted_rand_score, adjusted_mutual_info_score])
@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ([0, 1], X, TypeError, "labels_true must be a torch.Tensor, got list"),
        (X, X.double(), TypeError, "labels_pred must be of an integer dtype, got torch.float64"),
        (X.bool(), X, TypeError, "labels_true must be of an integer dtype, got torch.bool"),
        (X[None], X, ValueError, r"labels_true must have 1 dimension, got shape \(1, 4\)"),
        (X, X[:3], ValueError, "labels_pred must have 4 entries as labels_true, got 3"),
        (X, X.to("meta"), ValueError, "labels_pred is on meta but labels_true is on cpu"),
        (X, X - 2, ValueError, r"labels_pred must be -1 \(in no cluster\) or more, got -2"),
    ],
)
def test_bad_labels_are_named(score, first, second, error, message):
    with pytest.raises(error, match=message):
        score(first, second)
