"""Metrics against formulas written out, on the features of real captions and pictures, and on inputs that do not fit."""

import math
import subprocess
import sys

import pytest
import torch
from pair_files import emoji_with_groups

from protoclip_losses import metrics


@pytest.fixture(scope="module")
def emoji():
    """Plain features of real pairs: pictures as pixels and captions as counts of letters, both 48 wide; and their groups."""
    pairs, groups = emoji_with_groups()
    pixels = torch.nn.functional.adaptive_avg_pool2d(pairs.pictures.double() / 255, 4).flatten(1)
    letters = torch.stack(
        [torch.bincount(torch.tensor([ord(c) % 48 for c in caption]), minlength=48) for caption in pairs.captions]
    ).double()
    return pixels, letters, groups


def unit(x):
    return x / x.square().sum(1, keepdim=True).sqrt()


def test_modality_gap_is_the_distance_of_the_means(emoji):
    image, text, _ = emoji
    expected = math.sqrt(((sum(unit(image)) / len(image) - sum(unit(text)) / len(text)) ** 2).sum())
    assert metrics.modality_gap(image, text) == pytest.approx(expected, rel=1e-12)
    assert metrics.modality_gap(image, image * 3) == pytest.approx(0, abs=1e-12)
    assert metrics.modality_gap(torch.ones(4, 2), -torch.ones(9, 2)) == pytest.approx(2)


@pytest.mark.parametrize("block", [7, 1024])
def test_retrieval_recall_against_a_loop(emoji, block, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ROWS", block)
    image, text, groups = (x[:120] for x in emoji)
    for concepts in (None, groups, torch.arange(120) // 2):
        same = torch.arange(120) if concepts is None else concepts
        got = metrics.retrieval_recall(image, text, concepts, ks=(1, 5, 10))
        similarity = unit(image) @ unit(text).T
        for way, table in (("image_to_text", similarity), ("text_to_image", similarity.T)):
            for k in (1, 5, 10):
                hits = [bool((same[row.argsort(descending=True)[:k]] == same[i]).any()) for i, row in enumerate(table)]
                # Letter counts repeat, and a tie counts against the query.
                assert got[f"{way}_recall@{k}"] <= sum(hits) / 120 + 1e-12
                assert got[f"{way}_recall@{k}"] >= sum(hits) / 120 - 0.05


def test_retrieval_with_a_gallery_of_its_own(emoji):
    image, text, _ = emoji
    pictures = torch.cat([image[:50], 2 * image[:50]])
    concepts = torch.arange(50).repeat(2)
    once = metrics.retrieval_recall(pictures, image[:50], concepts, ks=(1,), text_concepts=torch.arange(50))
    assert min(once.values()) > 0.9
    with pytest.raises(ValueError, match="concepts: 2 queries"):
        metrics.retrieval_recall(image[:4], text[:3], torch.tensor([0, 1, 7, 7]), text_concepts=torch.tensor([0, 1, 1]))


def test_a_collapsed_encoder_finds_nothing():
    point = torch.ones(30, 4)
    assert set(metrics.retrieval_recall(point, point, ks=(1, 5)).values()) == {0.0}
    labels = torch.arange(30) % 3
    assert metrics.zero_shot_accuracy(point, labels, torch.ones(3, 4), topk=(1, 2, 3)) == {"top1": 0.0, "top2": 0.0, "top3": 1.0}


def test_zero_shot_against_a_loop(emoji):
    image, _, groups = emoji
    prompts = [image[groups == group][:5] for group in range(9)]
    classifier = metrics.zero_shot_classifier(prompts)
    for group, rows in enumerate(prompts):
        mean = sum(row / row.norm() for row in rows) / len(rows)
        torch.testing.assert_close(classifier[group], mean / mean.norm())
    guesses = (unit(image) @ classifier.T).argsort(1, descending=True)
    got = metrics.zero_shot_accuracy(image, groups, classifier, topk=(1, 5))
    assert got["top1"] == pytest.approx(float((guesses[:, 0] == groups).double().mean()))
    assert got["top5"] == pytest.approx(float((guesses[:, :5] == groups[:, None]).any(1).double().mean()))


def test_linear_probe_learns_and_never_looks_at_the_test_rows(emoji):
    image, _, groups = emoji
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
    image, groups = image[order], groups[order]
    half = len(image) // 2
    got = metrics.linear_probe(image[:half], groups[:half], image[half:], groups[half:])
    majority = float(groups.bincount().max()) / len(groups)
    assert got["accuracy"] > majority + 0.15
    assert got == metrics.linear_probe(image[:half], groups[:half], image[half:], groups[half:])
    # The choice of C hangs on the training rows alone.
    other = metrics.linear_probe(image[:half], groups[:half], image[half:].flip(0), groups[half:])
    assert other["C"] == got["C"]
    # Rescaled or shifted features are the same features.
    moved = metrics.linear_probe(image[:half] * 100 + 5, groups[:half], image[half:] * 100 + 5, groups[half:])
    assert moved["accuracy"] == pytest.approx(got["accuracy"], abs=0.01)


def test_linear_probe_with_classes_of_one_row():
    x, y = torch.eye(6), torch.tensor([0, 0, 1, 2, 3, 3])
    assert metrics.linear_probe(x, y, x, y)["accuracy"] > 0.5


def test_grouping_of_a_perfect_and_of_a_chance_clustering(emoji):
    image, _, groups = emoji
    centres = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert metrics.grouping(centres[groups], groups) == pytest.approx({"ari": 1.0, "ami": 1.0})
    shuffled = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    assert max(map(abs, metrics.grouping(image, shuffled).values())) < 0.03
    real = metrics.grouping(image, groups)
    assert real["ami"] > 0.05
    # Names of classes do not matter, and neither does the length of a feature.
    renamed = metrics.grouping(image * torch.rand(len(image), 1).double().add(0.5), groups * 7 + 3)
    assert renamed == pytest.approx(real, abs=1e-6)
    assert metrics.grouping(image, groups, num_clusters=30) != real


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(emoji, dtype):
    image, text, groups = (x[:200] for x in emoji)
    low, exact = image.to(dtype), image.to(dtype).double()
    assert metrics.modality_gap(low, text.to(dtype)) == pytest.approx(
        metrics.modality_gap(exact, text.to(dtype).double()), abs=1e-5
    )
    assert metrics.retrieval_recall(low, low, groups)["image_to_text_recall@5"] == 1.0
    assert metrics.zero_shot_accuracy(low, torch.arange(200), low)["top1"] > 0.9


X, Y = torch.eye(4), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.modality_gap(X[0], X), ValueError, r"image: got shape \(4,\), wanted \(rows, d\)"),
        (lambda: metrics.modality_gap(X, X[:, :3]), ValueError, r"text: got shape \(4, 3\), wanted \(rows, 4\)"),
        (lambda: metrics.modality_gap(X[:0], X), ValueError, "at least one row"),
        (lambda: metrics.modality_gap(X.long(), X), TypeError, "image: got torch.int64, wanted a floating-point"),
        (lambda: metrics.modality_gap(X.numpy(), X), TypeError, "image: got ndarray"),
        (lambda: metrics.modality_gap(X / 0, X), ValueError, "image: 4 of 4 rows hold NaN or Inf"),
        (lambda: metrics.retrieval_recall(X, X[:3]), ValueError, "text: got 3 rows for 4 images"),
        (lambda: metrics.retrieval_recall(X, X, Y[:3]), ValueError, r"concepts: got shape \(3,\), wanted \(4,\)"),
        (lambda: metrics.retrieval_recall(X, X, Y.float()), TypeError, "concepts: got torch.float32, wanted an integer"),
        (lambda: metrics.retrieval_recall(X, X, ks=(0,)), ValueError, r"ks: got \(0,\)"),
        (lambda: metrics.retrieval_recall(X, X, ks=()), ValueError, r"ks: got \(\)"),
        (lambda: metrics.retrieval_recall(X, X, text_concepts=Y), ValueError, "concepts: got None beside text_concepts"),
        (lambda: metrics.zero_shot_classifier([]), ValueError, "prompt_embeddings: got no class"),
        (lambda: metrics.zero_shot_classifier([X, X[:, :2]]), ValueError, r"prompt_embeddings\[1\]: got shape \(4, 2\)"),
        (lambda: metrics.zero_shot_classifier([X[:0]]), ValueError, r"prompt_embeddings\[0\]"),
        (lambda: metrics.zero_shot_classifier([torch.stack([X[0], -X[0]])]), ValueError, "average to zero"),
        (lambda: metrics.zero_shot_accuracy(X, Y, X[:3]), ValueError, r"labels: got values from 0 to 3, wanted them in \[0, 3\)"),
        (lambda: metrics.zero_shot_accuracy(X, Y, X, topk=(5,)), ValueError, r"topk: got \(5,\)"),
        (lambda: metrics.linear_probe(X, Y * 0, X, Y), ValueError, "train_y: got 1 class"),
        (lambda: metrics.linear_probe(X, Y, X[:, :2], Y), ValueError, r"test_x: got shape \(4, 2\)"),
        (lambda: metrics.linear_probe(X, Y, X, Y[:2]), ValueError, "test_y: got shape"),
        (lambda: metrics.grouping(X, Y, num_clusters=5), ValueError, "num_clusters: got 5, wanted a number from 1 to the 4 rows"),
        (lambda: metrics.grouping(X, Y.bool()), TypeError, "labels: got torch.bool"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("call", ["metrics.grouping(x, y)", "metrics.linear_probe(x, y, x, y)"])
def test_without_scikit_learn_the_error_says_what_to_install(call):
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import torch; from protoclip_losses import metrics\n"
        f"x, y = torch.eye(4), torch.arange(4)\nprint(metrics.modality_gap(x, x))\n{call}"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "0.0"
    assert "ImportError" in ended.stderr
    assert "pip install 'protoclip-losses[metrics]'" in ended.stderr
