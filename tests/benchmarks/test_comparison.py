"""The comparison's own parts: its splits, its statistics, its arms, and that a run which is there is not run again."""

import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import benchmarks
from benchmarks.comparison.arms import Schedule, Settings, apart, is_evaluated, one_each, pool_rows, shuffled_captions
from benchmarks.comparison.emoji_styles import STYLES, family, load, splits
from benchmarks.comparison.extras import WordClasses, sampled_terms
from benchmarks.comparison.metrics import PENALTIES, linear_probes, ridge_probe
from benchmarks.comparison.run import Run, append, finished, read_plan
from benchmarks.comparison.stats import final, interval, mean_curve, paired, read_table, share_of_time
from benchmarks.comparison.train import Clock
from protoclip_losses import EpisodicClusterer, FeatureBank, ProtoLoss

BENCHMARKS = Path(benchmarks.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """600 pictures of 200 concepts in three styles, two of which are trained on; a concept's pictures have one colour."""
    rng = np.random.default_rng(0)
    concepts = np.repeat(np.arange(200), 3)
    style_names = np.array(["twemoji", "noto", "fxemoji"])
    colours = rng.integers(0, 256, (200, 3, 1, 1))
    noise = rng.integers(-20, 21, (600, 3, 40, 40))
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(
        path,
        pictures=(colours[concepts] + noise).clip(0, 255).astype(np.uint8),
        captions=np.array([f"thing {concept}, colour" for concept in concepts]),
        concepts=concepts,
        family=np.array([family((0x1F300 + i,)) for i in range(200)])[concepts],
        style=np.tile(np.arange(3), 200),
        style_names=style_names,
        group=concepts % 2,
        subgroup=concepts % 4,
        group_names=np.array(["even", "odd"]),
        subgroup_names=np.array(["a", "b", "c", "d"]),
    )
    return path


def test_parts_share_no_concept_and_no_style_that_they_should_not(data):
    pairs = load(data)
    rows = splits(pairs)
    concepts = {name: set(pairs.concepts[index].tolist()) for name, index in rows.items()}
    styles = {name: {pairs.label_names["style"][i] for i in pairs.labels["style"][index]} for name, index in rows.items()}
    assert styles == {
        "train": {"twemoji", "noto"},
        "validation": {"twemoji", "noto"},
        "concepts": {"twemoji", "noto"},
        "styles": {"fxemoji"},
        "both": {"fxemoji"},
    }
    assert not STYLES["fxemoji"].trained_on
    for a, b in (("train", "validation"), ("train", "concepts"), ("validation", "concepts"), ("styles", "both")):
        assert not concepts[a] & concepts[b]
    assert concepts["styles"] == concepts["train"]
    assert concepts["both"] == concepts["concepts"]
    shares = [len(concepts[name]) / 200 for name in ("train", "validation", "concepts")]
    assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.08)
    assert sum(shares) == 1


def test_gender_makes_no_other_family():
    runner, woman, man = 0x1F3C3, (0x200D, 0x2640, 0xFE0F), (0x200D, 0x2642, 0xFE0F)
    assert family((runner,)) == family((runner, *woman)) == family((runner, *man))
    assert family((0x1F469, 0x200D, 0x1F692)) == family((0x1F468, 0x200D, 0x1F692)) == family((0x1F9D1, 0x200D, 0x1F692))
    assert family((0x1F469, 0x200D, 0x1F692)) != family((0x1F469, 0x200D, 0x1F680))


def test_missing_pictures_say_how_to_make_them(tmp_path):
    with pytest.raises(SystemExit, match="npm pack"):
        load(tmp_path / "none.npz")


def test_interval_by_hand():
    # Mean 2.5, deviation sqrt(5/3), t with 3 degrees of freedom 3.18245.
    result = interval([1.0, 2.0, 3.0, 4.0])
    assert result.mean == 2.5
    assert result.n == 4
    assert result.high - 2.5 == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-5)
    assert result.low == pytest.approx(5 - result.high)
    assert result.clear
    assert not interval([-1.0, 2.0, 3.0, 4.0]).clear
    assert interval([-1.0, -2.0, -3.0, -4.0]).clear
    assert interval([5.0]) == (5.0, -math.inf, math.inf, 1)


def test_differences_are_paired_by_seed_whatever_the_order():
    ours = {2: [{"x": 0.0}, {"x": 3.0}], 0: [{"x": 1.0}], 7: [{"x": 50.0}]}
    theirs = {0: [{"x": 0.5}], 1: [{"x": -9.0}], 2: [{"x": 9.0}, {"x": 1.5}]}
    result = paired(ours, theirs, "x")
    assert result is not None
    assert (result.mean, result.n) == (1.0, 2)  # of 0.5 and 1.5; the last row of a run counts
    assert paired(ours, theirs, "y") is None
    assert final(ours, "x") == {0: 1.0, 2: 3.0, 7: 50.0}


def test_share_of_time_to_the_best_figure():
    theirs = [{"x": 0.2, "t": 10.0}, {"x": 0.5, "t": 20.0}, {"x": 0.4, "t": 30.0}]
    ours = [{"x": 0.1, "t": 12.0}, {"x": 0.5, "t": 24.0}, {"x": 0.7, "t": 36.0}]
    assert share_of_time(ours, theirs, "x", "t") == pytest.approx(0.8)  # 24 of 30
    assert share_of_time(ours[:1], theirs, "x", "t") == math.inf


def test_mean_curve():
    runs = {0: [{"x": 1.0}, {"x": 2.0}], 1: [{"x": 3.0}, {"x": 6.0}]}
    assert mean_curve(runs, ["x"]) == [{"x": 2.0}, {"x": 4.0}]


def test_schedule_of_prototypes():
    schedule = Schedule(Settings(passes=8, warmup_passes=2, last_passes=1, cluster_every=2), samples=100)
    assert (schedule.episodes, schedule.episode_size) == (8, 100)
    assert [number for number in range(8) if schedule.with_prototypes(number)] == [2, 3, 4, 5, 6]
    assert [number for number in range(8) if schedule.clusters(number)] == [2, 4, 6]
    assert [done for done in range(1, 10) if is_evaluated(done, 9)] == [1, 2, 4, 6, 8, 9]
    shorter = Schedule(Settings(passes=1.5, warmup_passes=0.5, episode_size=25), samples=100)
    assert (shorter.episodes, shorter.episode_size) == (6, 25)
    assert [number for number in range(6) if shorter.with_prototypes(number)] == [2, 3, 4, 5]


def test_pictures_that_are_trained_on(data):
    pairs = load(data)
    assert pool_rows(pairs, Settings()).tolist() == list(range(600))
    assert pool_rows(pairs, Settings(drawings="one")).tolist() == one_each(pairs).tolist()
    some = pool_rows(pairs, Settings(samples=50)).tolist()
    assert len(set(some)) == 50
    assert some == pool_rows(pairs, Settings(samples=50)).tolist()


def test_a_gap_leaves_a_modality_as_it_is_and_weakens_what_lies_between():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(2, 5, 4), dim=2)
    out = {"image_features": x, "text_features": y, "logit_scale": torch.tensor(10.0)}
    wide = apart(out, 60)
    image, text = wide["image_features"], wide["text_features"]
    assert wide["logit_scale"] is out["logit_scale"]
    torch.testing.assert_close(image @ image.T, x @ x.T)
    torch.testing.assert_close(text @ text.T, y @ y.T)
    torch.testing.assert_close(image @ text.T, 0.5 * x @ y.T)


def test_shuffled_captions_are_one_for_each_concept_and_never_its_own(data):
    pairs = load(data)
    shuffled = shuffled_captions(pairs)
    by_concept: dict[int, set[str]] = {}
    for concept, own, other in zip(pairs.concepts.tolist(), pairs.captions, shuffled, strict=True):
        assert own != other
        by_concept.setdefault(concept, set()).add(other)
    assert all(len(captions) == 1 for captions in by_concept.values())
    assert len(set(shuffled)) == len(by_concept)


def test_one_drawing_of_each_concept(data):
    pairs = load(data)
    chosen = pairs.subset(one_each(pairs))
    assert sorted(chosen.concepts.tolist()) == list(range(200))
    assert chosen.labels["style"].tolist() == [concept % 3 for concept in chosen.concepts.tolist()]  # of styles 0, 1, 2 each


def test_words_of_a_caption_are_classes_of_the_picture():
    classes = WordClasses(["red cat", "red dog", "a cat, a red cat", "!", "a"], vocabulary=3, width=4, seed=0)
    # 0 is red, 1 cat, 2 a; the dog is the fourth.
    assert classes.labels[:, :4].tolist() == [[0, 1, -1, -1], [0, -1, -1, -1], [2, 1, 0, -1], [-1] * 4, [2, -1, -1, -1]]
    torch.testing.assert_close(classes.idf, torch.log(torch.tensor([5 / 3, 5 / 2, 5 / 2])))
    image = F.normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    logits = (5.0 * image @ F.normalize(classes.prototypes, dim=1).T).log_softmax(1)
    of_first = (logits[0, :2] * classes.idf[:2]).sum() / classes.idf[:2].sum()
    of_third = (logits[1] * classes.idf).sum() / classes.idf.sum()
    torch.testing.assert_close(classes(image, torch.tensor([0, 2]), torch.tensor(5.0)), -(of_first + of_third) / 2)


def test_sampled_prototypes_keep_those_of_the_batch():
    torch.manual_seed(0)
    h = F.normalize(torch.randn(40, 4), dim=1)
    prototypes = EpisodicClusterer(8).build(FeatureBank.from_features(torch.arange(40), image=h, text=h))
    index = torch.tensor([3, 11])
    out = {"image_features_projected": h[index], "text_features_projected": h[index], "logit_scale_proto": torch.tensor(5.0)}
    few, half, every = (float(sampled_terms(prototypes, out, index, share, torch.Generator())) for share in (0.0, 0.5, 1.0))
    assert few < half < every  # fewer to tell apart
    loss = ProtoLoss(w_clip=0.0, target_temperature=None)
    loss.set_prototypes(prototypes)
    assert every == pytest.approx(float(loss(h[index], h[index], 5.0, index=index)), rel=1e-5)
    labels = prototypes.labels_by_teacher["text"][prototypes.positions(index)]
    assert (few > 0) == (labels[0] != labels[1])


def test_probes_find_classes_that_lie_on_lines():
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.eye(3)[y] @ torch.randn(3, 16) * 3 + torch.randn(300, 16)
    assert ridge_probe(x[:200], y[:200], x[200:], y[200:]) > 0.95
    parts = {"train": (x[:200], y[:200]), "validation": (x[200:250], y[200:250]), "concepts": (x[250:], y[250:])}
    found = linear_probes({n: a for n, (a, _) in parts.items()}, {n: b for n, (_, b) in parts.items()})
    assert found.keys() == {"validation", "concepts"}
    assert min(found.values()) > 0.9
    wrong = {n: (b if n != "concepts" else (b + 1) % 3) for n, (_, b) in parts.items()}
    assert linear_probes({n: a for n, (a, _) in parts.items()}, wrong)["concepts"] < 0.1


def test_the_penalty_is_the_one_that_is_best_on_validation_concepts():
    chosen = []
    for noise in (torch.full((60,), 1.5), torch.linspace(0, 6, 60)):  # alike in all columns, and in some of them little
        torch.manual_seed(0)
        y = torch.arange(400) % 4
        x = torch.randn(4, 60)[y] * 0.4 + noise * torch.randn(400, 60)
        rows = {"train": slice(0, 100), "validation": slice(100, 250), "concepts": slice(250, 400)}
        scaler = StandardScaler().fit(x[:100])
        scores = []
        for penalty in PENALTIES:
            probe = LogisticRegression(C=penalty, max_iter=300, tol=1e-3).fit(scaler.transform(x[:100]), y[:100])
            scores.append([probe.score(scaler.transform(x[rows[part]]), y[rows[part]]) for part in ("validation", "concepts")])
        best = max(range(len(PENALTIES)), key=lambda i: scores[i][0])
        chosen.append(best)
        found = linear_probes({n: x[r] for n, r in rows.items()}, {n: y[r] for n, r in rows.items()})
        assert [found["validation"], found["concepts"]] == pytest.approx(scores[best])
    assert chosen == [0, 1]


def test_clock_counts_this_process_and_not_the_wait():
    clock = Clock()
    with clock.stage("training"):
        torch.randn(500, 500) @ torch.randn(500, 500)
        time.sleep(0.3)
    columns = clock.columns()
    assert columns["cpu_s"] < 0.3 <= columns["wall_s"]
    assert 0 < columns["cpu_training_s"] == columns["cpu_s"]
    assert columns["cpu_extraction_s"] == 0


def test_a_plan_gives_every_arm_of_a_seed_before_the_next(tmp_path):
    path = tmp_path / "plan.json"
    arms = {"b": {"seeds": 3, "first_seed": 1}, "a": {"seeds": 2, "settings": {"passes": 3, "method": "clip"}}}
    path.write_text(json.dumps({"common": {"batch_size": 64}, "arms": arms}))
    changed = {"batch_size": 64, "passes": 3}
    assert read_plan(path) == [
        Run("a", 0, changed),
        Run("b", 1, {"batch_size": 64}),
        Run("a", 1, changed),
        Run("b", 2, {"batch_size": 64}),
    ]
    assert read_plan(path, arms=["a"], seeds=[7, 5]) == [Run("a", 5, changed), Run("a", 7, changed)]
    with pytest.raises(SystemExit, match=r"arms must be among \['a', 'b'\], got \['c'\]"):
        read_plan(path, arms=["a", "c"])
    path.write_text(json.dumps({"arms": {"a": {"seeds": 1, "settings": {"pases": 3}}}}))
    with pytest.raises(SystemExit, match="'pases'"):
        read_plan(path)


def test_committed_plans_can_be_read():
    for path in (BENCHMARKS / "comparison" / "plans").glob("*.json"):
        assert read_plan(path)


def test_a_run_is_added_once(tmp_path):
    table, run = tmp_path / "table.csv", Run("a", 3, {"passes": 1})
    rows = [{"pass": 1, "cpu_s": 0.123456789}, {"pass": 2, "cpu_s": 1.0}]
    append(table, run, rows, ())
    append(table, run, rows, ())
    append(table, run._replace(seed=4), rows, ())
    with table.open() as file:
        assert [(row["seed"], row["pass"], row["cpu_s"]) for row in csv.DictReader(file)] == [
            ("3", "1", "0.123457"),
            ("3", "2", "1"),
            ("4", "1", "0.123457"),
            ("4", "2", "1"),
        ]
    assert finished(table) == {("a", "3", '{"passes": 1}'), ("a", "4", '{"passes": 1}')}
    append(table, run._replace(changed={"passes": 2}), rows, ())
    with pytest.raises(ValueError, match="'a' has runs with settings"):
        read_table(table)


@pytest.mark.slow
def test_every_arm_trains_and_a_second_call_runs_what_is_missing(data, tmp_path):
    plan, table = tmp_path / "plan.json", tmp_path / "results" / "table.csv"
    small = {"passes": 2, "batch_size": 64, "num_prototypes": 8, "side": 16, "head_width": 32, "precision": "fp32"}
    words = {"method": "episodic", "features": "training", "teacher": "words", "w_external": 1.0}
    arms = {
        "random": {"passes": 0},
        "clip": {},
        "protoclip": {"method": "episodic", "features": "training"},
        "no_pbt": {"method": "episodic", "back_translation": False, "target_temperature": 0},
        "online": {"method": "online"},
        "gap": {"method": "episodic", "gap": 60, "captions": "shuffled", "judged_on": "validation"},
        "one": {"drawings": "one"},
        "words": {
            **words,
            "w_proto": 0,
            "teacher_clusters": "whole",
            "labels_per_sample": 2,
            "teacher_levels": [4],
            "repeats": "share",
        },
        "more": {**words, "teacher": "both", "teacher_prototypes": 6, "distill": "relational"},
        "online_words": {"method": "online", "teacher": "words", "w_external": 1.0, "teacher_dim": 16},
        "distill": {"teacher": "words", "distill": "relational", "w_distill": 2.0},
        "sampled": {**words, "w_proto": 0, "teacher_clusters": "whole", "sampled": 0.1},
        "classes": {"word_classes": 1.0, "precision": "bf16"},
    }
    plan.write_text(json.dumps({"common": small, "arms": {name: {"seeds": 1, "settings": s} for name, s in arms.items()}}))

    def compare():
        command = [sys.executable, "-m", "benchmarks.comparison", str(plan), str(table), "--data", str(data), "--jobs", "2"]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=BENCHMARKS.parent).stdout

    assert "13 runs planned, 13 left" in compare()
    first = table.read_text()
    runs = read_table(table)
    assert {arm: [row["pass"] for row in seeds[0]] for arm, seeds in runs.items()} == {
        arm: [0] if arm == "random" else [1, 2] for arm in arms
    }
    judged = runs.pop("gap")[0][-1]
    assert "validation/linear_probe_group" in judged
    assert not [name for name in judged if name.startswith(("concepts", "styles", "both"))]
    for arm, seeds in runs.items():
        end = seeds[0][-1]
        assert 0 < end["concepts/linear_probe_group"] <= 1
        assert {"both/zero_shot_subgroup", "validation/ami_subgroup", "styles/image_to_text_recall@5"} <= end.keys()
        assert arm == "random" or end["cpu_s"] > 0
    assert runs["protoclip"][0][-1]["cpu_clustering_s"] > 0 == runs["clip"][0][-1]["cpu_clustering_s"]
    assert runs["protoclip"][0][-1]["cpu_extraction_s"] == 0 < runs["no_pbt"][0][-1]["cpu_extraction_s"]
    assert 2 * runs["one"][0][-1]["samples"] == runs["clip"][0][-1]["samples"]  # two styles are trained on
    # The first pass is InfoNCE alone in all of them, from the same start and in the same order.
    one = [runs[arm][0][0]["validation/zero_shot_group"] for arm in ("clip", "protoclip", "no_pbt", "online")]
    assert len(set(one)) == 1
    others = ("clip", "protoclip", "no_pbt", "online", "more", "distill", "online_words", "sampled")
    assert len({runs[arm][0][1]["validation/modality_gap"] for arm in others}) == len(others)

    assert "13 runs planned, 0 left" in compare()
    assert table.read_text() == first
    # One of them has a teacher whose cache is complete by now.
    kept = [line for line in first.splitlines(keepends=True) if not line.startswith(("online,", "more,"))]
    table.write_text("".join(kept))
    assert "13 runs planned, 2 left" in compare()
    again = read_table(table)["online"][0][-1]
    assert again["concepts/zero_shot_group"] == runs["online"][0][-1]["concepts/zero_shot_group"]
