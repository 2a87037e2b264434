"""Metrics against formulas written out, on the features of real captions and pictures, and on inputs that do not fit."""

import math
import subprocess
import sys

import pytest
import torch
from cases import set_sizes
from pair_files import emoji_with_groups
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip_losses import _dtypes, metrics
from protoclip_losses.kernels.sizes import SIZES


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
    set_sizes(monkeypatch, block_bytes=block * 2 * 120 * 8)
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
    with pytest.raises(ValueError, match=r"concepts must give each query a positive, got 2 \(image_to_text\) without one"):
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


def every_metric(image, text, groups):
    """All that there is, of the same features."""
    half = slice(0, None, 2), slice(1, None, 2)
    prompts = [text[groups == group][:5] for group in range(9)]
    return {
        "gap": metrics.modality_gap(image, text),
        **metrics.retrieval_recall(image, text, groups),
        **metrics.zero_shot_accuracy(image, groups, metrics.zero_shot_classifier(prompts), topk=(1, 3)),
        **metrics.linear_probe(*(x[rows] for rows in half for x in (image, groups))),
        **metrics.grouping(image, groups),
    }


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e20), (torch.float32, 1e-20), (torch.float64, 1e200), (torch.float64, 1e-200)],
)
def test_features_of_any_finite_scale(emoji, dtype, scale):
    """Squares of these leave the range of the dtype: rows would come out as zeros, or as they are, and every metric as 0."""
    image, text, groups = emoji
    image, text = image.to(dtype), text.to(dtype)
    want = every_metric(image, text, groups)
    assert min(want.values()) > 0
    assert every_metric(image * scale, text / 64, groups) == pytest.approx(want, abs=2e-3)
    assert every_metric(image, text * scale, groups) == pytest.approx(want, abs=2e-3)
    assert metrics.modality_gap(image * scale, text) == pytest.approx(want["gap"], rel=1e-6)


def test_rows_of_zeros_are_no_error():
    image = torch.eye(3)
    image[2] = 0
    got = metrics.retrieval_recall(image, torch.eye(3), ks=(1,))
    assert got["image_to_text_recall@1"] == pytest.approx(2 / 3)  # the row of zeros is as near to each text
    assert metrics.zero_shot_accuracy(image, torch.arange(3), torch.eye(3))["top1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [4, 33, 512])
def test_equal_rows_tie_in_every_dtype_and_width(dtype, width):
    """A matrix product may round equal columns differently: the tie would be decided by the column's position."""
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(40, 1)
    assert set(metrics.retrieval_recall(rows, rows, ks=(1, 5, 39)).values()) == {0.0}
    assert metrics.retrieval_recall(rows, rows, ks=(40,))["image_to_text_recall@40"] == 1
    assert metrics.retrieval_recall(rows, rows, torch.arange(280) % 7, ks=(1,))["image_to_text_recall@1"] == 1
    same = metrics.zero_shot_accuracy(rows, torch.arange(280) % 8, rows[:1].expand(8, -1), topk=(1, 7, 8))
    assert same == {"top1": 0, "top7": 0, "top8": 1}


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint32, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_dtype(emoji, kind):
    image, text, groups = (x[:90] for x in emoji)
    groups = torch.arange(90) % 9
    assert every_metric(image, text, groups.to(kind)) == every_metric(image, text, groups)


def test_features_of_two_precisions(emoji):
    image, text, groups = emoji
    got = metrics.retrieval_recall(image.float(), text, groups)
    assert got == pytest.approx(metrics.retrieval_recall(image, text, groups), abs=5e-3)
    assert metrics.zero_shot_accuracy(torch.eye(3).double(), torch.arange(3), torch.eye(3).half()) == {"top1": 1.0}


def test_autocast_changes_nothing(emoji):
    image, text, groups = (x.float() if x.is_floating_point() else x for x in emoji)
    want = every_metric(image, text, groups)
    with torch.autocast("cpu", torch.bfloat16):
        assert every_metric(image, text, groups) == want


def test_grouping_scores_as_scikit_learn_does(emoji):
    import sklearn.cluster
    import sklearn.metrics

    image, _, groups = emoji
    found = sklearn.cluster.KMeans(12, n_init=10, random_state=3).fit_predict(unit(image).numpy())
    want = {
        "ari": sklearn.metrics.adjusted_rand_score(groups, found),
        "ami": sklearn.metrics.adjusted_mutual_info_score(groups, found),
    }
    assert metrics.grouping(image, groups, num_clusters=12, seed=3) == pytest.approx(want, abs=1e-9)
    # Any integers name classes, negative ones too.
    assert metrics.grouping(image, groups - 4, num_clusters=12, seed=3) == pytest.approx(want, abs=1e-9)
    assert metrics.adjusted_rand_score(groups, torch.from_numpy(found)) == pytest.approx(want["ari"], abs=1e-10)
    assert metrics.adjusted_mutual_info_score(groups, torch.from_numpy(found)) == pytest.approx(want["ami"], abs=1e-10)


def test_prompts_that_cancel_out_but_for_rounding_are_found():
    angles = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    with pytest.raises(ValueError, match="cancel out"):
        metrics.zero_shot_classifier([torch.stack([angles.cos(), angles.sin()], 1)])


@pytest.mark.parametrize("metric", ["zero_shot", "retrieval"])
def test_similarities_are_never_held_at_once(metric):
    """20,000 images and 5,000 classes or captions: 400 MB in float32, and as much again for what is compared."""
    image, classes = torch.randn(20_000, 8), torch.randn(5000, 8)
    labels = torch.arange(20_000) % 5000
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Sizes():
        if metric == "zero_shot":
            metrics.zero_shot_accuracy(image, labels, classes)
        else:
            metrics.retrieval_recall(image, classes, labels, ks=(1,), text_concepts=torch.arange(5000))
    assert largest <= SIZES["cpu"].block_bytes // 2


def test_no_float64_where_the_device_has_none(emoji, monkeypatch):
    """As on MPS: every tensor stays in float32. scikit-learn's part of the probe and of the grouping is on the CPU anyway."""
    image, text, groups = (x.float() if x.is_floating_point() else x for x in emoji)
    for name, module in list(sys.modules.items()):
        if name.startswith("protoclip_losses.metrics.") and hasattr(module, "sum_dtype"):
            monkeypatch.setattr(module, "sum_dtype", lambda device: _dtypes.sum_dtype(torch.device("mps")))

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64, func
            return out

    want = metrics.modality_gap(image, text)
    with NoFloat64():
        assert metrics.modality_gap(image, text) == pytest.approx(want, rel=1e-5)
        metrics.retrieval_recall(image, text, groups)
        classifier = metrics.zero_shot_classifier([text[groups == group][:5] for group in range(9)])
        metrics.zero_shot_accuracy(image, groups, classifier)


X, Y = torch.eye(4), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.modality_gap(X[0], X), ValueError, r"image must have 2 dimensions \(rows, width\), got shape \(4,\)"),
        (lambda: metrics.modality_gap(X, X[:, :3]), ValueError, r"text must have width 4 as image, got shape \(4, 3\)"),
        (
            lambda: metrics.modality_gap(X[:0], X),
            ValueError,
            r"image must have at least one row .*, got shape \(0, 4\)",
        ),
        (lambda: metrics.modality_gap(X.long(), X), TypeError, "image must be float16, .* or float64, got torch.int64"),
        (lambda: metrics.modality_gap(X.numpy(), X), TypeError, "image must be a torch.Tensor, got ndarray"),
        (lambda: metrics.modality_gap(X / 0, X), ValueError, "image must be finite, got NaN or Inf: 4 of 4 rows, the first at 0"),
        (lambda: metrics.modality_gap(X, X.to("meta")), ValueError, "text is on meta but image is on cpu"),
        (
            lambda: metrics.retrieval_recall(X, X[:3]),
            ValueError,
            "text must have 4 rows as image, or text_con.*, got 3",
        ),
        (lambda: metrics.retrieval_recall(X, X, Y[:3]), ValueError, "concepts must have 4 entries as image has rows, got 3"),
        (lambda: metrics.retrieval_recall(X, X, Y.float()), TypeError, "concepts must be of an integer dtype, got torch.float32"),
        (
            lambda: metrics.retrieval_recall(X, X, ks=(0,)),
            ValueError,
            r"ks must be .* whole numbers of at least 1, got \(0,\)",
        ),
        (lambda: metrics.retrieval_recall(X, X, ks=()), ValueError, r"ks must be one or more whole numbers .*, got \(\)"),
        (lambda: metrics.retrieval_recall(X, X, ks=(1.5,)), ValueError, r"ks must be one or more whole numbers .*, got \(1.5,\)"),
        (
            lambda: metrics.retrieval_recall(X, X, text_concepts=Y),
            ValueError,
            "concepts must be given where text_.* is, got None",
        ),
        (lambda: metrics.zero_shot_classifier([]), ValueError, "prompt_embeddings must have one .* per class, got no class"),
        (
            lambda: metrics.zero_shot_classifier([X, X[:, :2]]),
            ValueError,
            r"prompt_embeddings\[1\] must have width 4 as prompt_embeddings\[0\], got shape \(4, 2\)",
        ),
        (lambda: metrics.zero_shot_classifier([X[:0]]), ValueError, r"prompt_embeddings\[0\] must have at least one row"),
        (
            lambda: metrics.zero_shot_classifier([X, torch.stack([X[0], -X[0]])]),
            ValueError,
            r"prompt_embeddings\[1\] must have a mean other than zero, got prompts that cancel out",
        ),
        (
            lambda: metrics.zero_shot_accuracy(X, Y, X[:3]),
            ValueError,
            r"labels must lie in \[0, 3\) as classifier has rows, got 3 at position 3 \(1 of 4 out of range\)",
        ),
        (lambda: metrics.zero_shot_accuracy(X, Y - 1, X), ValueError, r"labels must lie in \[0, 4\).*, got -1 at position 0"),
        (lambda: metrics.zero_shot_accuracy(X, Y, X, topk=(5,)), ValueError, r"topk must be .* in \[1, 4\], got \(5,\)"),
        (lambda: metrics.linear_probe(X, Y * 0, X, Y), ValueError, "train_y must have at least 2 classes, got 1"),
        (lambda: metrics.linear_probe(X, Y, X[:, :2], Y), ValueError, r"test_x must have width 4 as train_x, got shape \(4, 2\)"),
        (lambda: metrics.linear_probe(X, Y, X, Y[:2]), ValueError, "test_y must have 4 entries as test_x has rows, got 2"),
        (
            lambda: metrics.grouping(X, Y, num_clusters=5),
            ValueError,
            r"num_clusters must be a whole number in \[1, 4\] as features has rows, got 5",
        ),
        (lambda: metrics.grouping(X, Y.bool()), TypeError, "labels must be of an integer dtype, got torch.bool"),
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
