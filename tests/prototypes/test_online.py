"""Prototypes from a queue of recent features, against a plain list of samples and the formulas in float64."""

import dense
import pytest
import torch
from cases import assert_near, leaf, unit
from helpers import in_new_process

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss
from protoclip_losses.clustering.assign import assign
from protoclip_losses.distributed import RankRows
from protoclip_losses.functional import prototype_cross_entropy, soft_targets
from protoclip_losses.prototypes import BatchFeatures
from protoclip_losses.prototypes.extra_state import unpack

K, QUEUE, EVERY, WARMUP, BATCH = 5, 40, 4, 3, 8
NAN = float("nan")


def online(**changes):
    return OnlinePrototypes(**{"num_prototypes": K, "queue_size": QUEUE, "every": EVERY, "warmup": WARMUP, **changes})


def batch(step, rows=BATCH):
    """Image, text and a teacher of another width, in five groups that drift."""
    groups = torch.arange(rows) % K
    features = {}
    for i, (name, width) in enumerate((("image", 6), ("text", 6), ("minilm", 9))):
        x = unit(K, width, i)[groups] + 0.3 * unit(rows, width, 100 * step + i) + 0.02 * step * unit(1, width, 50 + i)
        features[name] = torch.nn.functional.normalize(x, dim=1).float()
    return features


def features(x):
    return BatchFeatures({"image": x["image"], "text": x["text"]}, {"minilm": x["minilm"]})


def observe(prototypes, x):
    prototypes.observe(features(x), {}, RankRows(None, [len(x["image"])]))


def take(prototypes, step, rows=BATCH):
    observe(prototypes, batch(step, rows))


class Twin:
    """The same by the docstring: a list of (step, sample), one Lloyd iteration over each EVERY steps."""

    def __init__(self):
        self.rows, self.centroids, self.step, self.sums = [], None, 0, None

    def take(self, step):
        x = batch(step)
        self.step += 1
        self.rows = (self.rows + [(self.step, {name: v[i].double() for name, v in x.items()}) for i in range(BATCH)])[-QUEUE:]

    def accumulate(self):
        for came, sample in self.rows:
            if (self.step - came) % EVERY == 0:
                for teacher, C in self.centroids.items():
                    label = int(torch.cdist(sample[teacher][None], C).argmin())
                    for name in {"image", "text", teacher}:
                        self.sums.setdefault((name, teacher, label), []).append(sample[name])

    def mean(self, name, teacher, otherwise):
        rows = [self.sums.get((name, teacher, k), []) for k in range(K)]
        return torch.stack([torch.stack(r).mean(0) if r else otherwise[k] for k, r in enumerate(rows)])


def test_prototypes_are_those_of_one_lloyd_iteration_over_the_queue_in_each_cycle():
    prototypes, twin = online(), Twin()
    for step in range(WARMUP):
        assert prototypes.terms == {}
        take(prototypes, step), twin.take(step)
    assert prototypes.version == 1
    assert prototypes.terms.keys() == {("text", "image"), ("image", "text"), ("image", "minilm"), ("text", "minilm")}
    assert prototypes.external_teachers == {"minilm"}
    for cycle in range(3):
        twin.centroids = {t: term.teacher_centroids.double() for (_, t), term in prototypes.terms.items()}
        twin.sums = {}
        for step in range(WARMUP + cycle * EVERY, WARMUP + (cycle + 1) * EVERY):
            assert prototypes.version == 1 + cycle
            take(prototypes, step), twin.take(step)
            twin.accumulate()
        for (student, teacher), term in prototypes.terms.items():
            assert_near(term.teacher_centroids, twin.mean(teacher, teacher, twin.centroids[teacher]))
            assert_near(term.prototypes, twin.mean(student, teacher, torch.zeros(K, 6).double()))


def test_the_first_prototypes_are_a_clustering_of_the_queue():
    """After K-means and one more iteration each centroid is the mean of the rows nearest to the K-means' centroid."""
    prototypes = online(niter=50)
    for step in range(WARMUP):
        take(prototypes, step)
    rows = {name: torch.cat([batch(step)[name] for step in range(WARMUP)]) for name in ("image", "text", "minilm")}
    for (student, teacher), term in prototypes.terms.items():
        labels = torch.cdist(rows[teacher], term.teacher_centroids).argmin(1)
        means, counts = dense.back_translate(labels, rows[student], K)
        assert_near(term.prototypes, means, 1e-5)  # settled: one iteration more changes nothing
        assert counts.sum() == WARMUP * BATCH


def test_a_centroid_that_nothing_is_near_stays_and_is_not_valid():
    prototypes = online()
    for step in range(WARMUP):
        take(prototypes, step)
    old = {key: term.teacher_centroids.clone() for key, term in prototypes.terms.items()}
    x = {name: v[:1].expand(QUEUE, -1) for name, v in batch(0).items()}
    for _ in range(EVERY):
        observe(prototypes, x)
    for key, term in prototypes.terms.items():
        assert term.valid.sum() == 1
        assert torch.equal(term.teacher_centroids[~term.valid], old[key][~term.valid])
        assert_near(term.prototypes[term.valid], x[key[0]][:1])


def test_rows_that_are_not_finite_are_in_no_cluster():
    prototypes = online()
    for step in range(WARMUP + EVERY):
        x = batch(step)
        x["minilm"][::2] = NAN
        observe(prototypes, x)
    assert prototypes.labels(features(x), None)["minilm"][::2].tolist() == [-1] * (BATCH // 2)
    assert (prototypes.labels(features(x), None)["minilm"][1::2] >= 0).all()
    assert all(torch.isfinite(term.prototypes).all() for term in prototypes.terms.values())


def test_a_batch_larger_than_the_queue_leaves_its_last_rows():
    prototypes = online(warmup=1)
    take(prototypes, 0, rows=100)
    same = online(warmup=1)
    x = {name: v[-QUEUE:] for name, v in batch(0, rows=100).items()}
    observe(same, x)
    for key, term in prototypes.terms.items():
        assert_near(term.prototypes.sum(0), same.terms[key].prototypes.sum(0), 1e-5)


def in_training(loss, steps, **kwargs):
    for step in range(steps):
        x = batch(step)
        loss(leaf(x["image"]), x["text"], 10.0, teacher_features={"minilm": x["minilm"]}, **kwargs)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_loss_is_that_of_the_nearest_centroids(temperature):
    loss = ProtoLoss(target_temperature=temperature, external_target_temperature=temperature, w_external=0.5)
    prototypes = online()
    loss.set_prototypes(prototypes)
    in_training(loss, WARMUP + EVERY)
    x = batch(99)
    h, t = leaf(x["image"]), leaf(x["text"])
    terms = dict(prototypes.terms)
    parts = loss(h, t, 10.0, logit_scale_proto=7.0, teacher_features={"minilm": x["minilm"]}, output_dict=True)
    wanted = {"proto_loss": 0, "proto_external_loss": 0}
    leaves = {"image": leaf(x["image"]), "text": leaf(x["text"])}
    for (student, teacher), term in terms.items():
        labels = torch.cdist(x[teacher], term.teacher_centroids).argmin(1)
        labels = labels.where(term.valid[labels], -1)
        M = None if temperature is None else soft_targets(term.teacher_centroids, term.prototypes, temperature, valid=term.valid)
        value = prototype_cross_entropy(leaves[student], term.prototypes, labels, 7.0, targets=M, valid=term.valid)
        part = "proto_external_loss" if teacher == "minilm" else "proto_loss"
        wanted[part] = wanted[part] + value / 2 * (0.5 if teacher == "minilm" else 1)
    for part, value in wanted.items():
        assert_near(parts[part], value)
    (parts["proto_loss"] + parts["proto_external_loss"]).backward()
    sum(wanted.values()).backward()
    assert_near(h.grad, leaves["image"].grad)
    assert_near(t.grad, leaves["text"].grad)


def test_warm_up_is_infonce_alone():
    loss = ProtoLoss()
    loss.set_prototypes(online())
    x = batch(0)
    parts = loss(leaf(x["image"]), x["text"], 10.0, output_dict=True)
    assert_near(parts["contrastive_loss"], InfoNCE()(x["image"], x["text"], 10.0))
    assert float(parts["proto_loss"].detach()) == 0


def test_the_labels_of_a_batch_are_sought_once(monkeypatch):
    loss, asked = ProtoLoss(), []
    loss.set_prototypes(online())
    in_training(loss, WARMUP)
    monkeypatch.setattr("protoclip_losses.prototypes.online.assign", lambda x, at: asked.append(len(x)) or assign(x, at))
    in_training(loss, 1)
    assert [rows for rows in asked if rows] == [BATCH] * 3  # of image, text and teacher; no row of the queue has its turn yet


def test_a_batch_counts_under_the_labels_that_it_is_given():
    prototypes = online(queue_size=BATCH * EVERY)
    for step in range(WARMUP + EVERY):
        x = batch(step)
        given = BatchFeatures({"image": x["image"]}, {"minilm": x["minilm"]})
        prototypes.observe(given, {"minilm": torch.full((BATCH,), 3)}, RankRows(None, [BATCH]))
    assert prototypes.terms["image", "minilm"].valid.nonzero().tolist() == [[3]]


def test_evaluation_takes_nothing_in():
    loss, prototypes = ProtoLoss(), online()
    loss.set_prototypes(prototypes)
    in_training(loss, WARMUP)
    with torch.no_grad():
        in_training(loss, 3)
    assert prototypes.step == WARMUP


def test_of_several_calls_for_the_same_samples_the_last_counts():
    once, thrice = online(), online(calls_per_step=3)
    for step in range(WARMUP + EVERY):
        for _ in range(3):
            assert thrice.version == once.version  # the same prototypes in all three
            take(thrice, step)
        take(once, step)
    for key, term in once.terms.items():
        assert torch.equal(term.prototypes, thrice.terms[key].prototypes)


CONTINUE = """
import sys, torch
from test_online import batch, in_training, online, EVERY, WARMUP
from protoclip_losses import ProtoLoss
loss = ProtoLoss(target_temperature=0.1)
loss.load_state_dict(torch.load(sys.argv[1], weights_only=True))
online = loss.prototypes
for step in range(WARMUP + 2, WARMUP + 2 * EVERY):
    x = batch(step)
    value = loss(x["image"].requires_grad_(), x["text"], 10.0, teacher_features={"minilm": x["minilm"]})
torch.save({"value": value.detach(), "state": online.state_dict()}, sys.argv[2])
"""


def test_a_saved_loss_goes_on_in_a_new_process_bit_for_bit(tmp_path, request):
    loss, prototypes = ProtoLoss(target_temperature=0.1), online()
    loss.set_prototypes(prototypes)
    in_training(loss, WARMUP + 2)  # within a cycle
    torch.save(loss.state_dict(), tmp_path / "state.pt")
    for step in range(WARMUP + 2, WARMUP + 2 * EVERY):
        x = batch(step)
        value = loss(leaf(x["image"]), x["text"], 10.0, teacher_features={"minilm": x["minilm"]})
    in_new_process(CONTINUE, tmp_path / "state.pt", tmp_path / "done.pt", folders=[request.path.parent])
    done = torch.load(tmp_path / "done.pt", weights_only=True)
    assert torch.equal(done["value"], value.detach())
    for name, kept in prototypes.state_dict()["terms"].items():
        for part, x in kept.items():
            assert torch.equal(done["state"]["terms"][name][part], x)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_prototypes": 0}, ValueError, "num_prototypes must be at least 1, got 0"),
        ({"queue_size": 4}, ValueError, "queue_size must be at least num_prototypes=5, got 4"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"warmup": 1.5}, TypeError, "warmup must be an int, got float"),
        ({"calls_per_step": 0}, ValueError, "calls_per_step must be at least 1, got 0"),
        ({"niter": 0}, ValueError, "niter must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        online(**changes)


def test_a_warm_up_that_is_too_short_is_an_error():
    prototypes = online(num_prototypes=30, warmup=2)
    take(prototypes, 0)
    with pytest.raises(ValueError, match="warmup=2 steps must leave at least num_prototypes=30 samples in the queue, got 16"):
        take(prototypes, 1)


def test_bad_calls_are_named():
    loss = ProtoLoss()
    loss.set_prototypes(online())
    x = batch(0)
    with pytest.raises(ValueError, match="index must be None with OnlinePrototypes"):
        loss(x["image"], x["text"], 10.0, index=torch.arange(BATCH))
    loss(leaf(x["image"]), x["text"], 10.0, teacher_features={"minilm": x["minilm"]})
    with pytest.raises(
        ValueError, match=r"features must have the names and widths of the first step, .*, got \{'image': 6, 'text': 6\}"
    ):
        loss(x["image"], x["text"], 10.0)
    with pytest.raises(ValueError, match=r"teacher_features\['minilm'\] must have 8 rows as image_features, got shape \(3, 9\)"):
        loss(x["image"], x["text"], 10.0, teacher_features={"minilm": x["minilm"][:3]})


def test_targets_of_prototypes_that_are_gone_are_not_saved():
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(online())
    in_training(loss, WARMUP + EVERY)  # the last step of a cycle
    assert loss.state_dict()["_extra_state"]["targets"] == []


@pytest.mark.parametrize("same", [True, False])
def test_targets_are_saved_as_they_were_built(same):
    """A row of M depends in its last bits on the rows it was built with: a resumed run must not build it again."""
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(online())
    in_training(loss, WARMUP + 1)
    state = {"_extra_state": unpack(loss.state_dict()["_extra_state"])}  # a mapping, as 0.7.0 saved it, loads too
    targets = state["_extra_state"]["targets"]
    assert [bool(t["rows"]["missing"].all()) for t in targets if t["rows"]] == [False, False]
    for t in targets:
        if t["rows"]:
            t["rows"]["values"] = t["rows"]["values"] + 1.0
    other = ProtoLoss(target_temperature=0.1, normalize_prototypes=not same)
    other.load_state_dict(state)
    for term, t in zip(other._terms.terms, targets, strict=True):
        if t["rows"]:
            assert torch.equal(term.targets.values, t["rows"]["values"]) == same
            assert term.targets.num_missing == int(t["rows"]["missing"].sum() if same else K)


def test_the_state_of_other_settings_is_an_error():
    with pytest.raises(ValueError, match="state_dict has every=4 but this OnlinePrototypes has every=7"):
        online(every=7).load_state_dict(online().state_dict())


def test_0_6_calls_warn_and_work():
    old, new = online(), online()
    for step in range(WARMUP):
        x = batch(step)
        with pytest.warns(FutureWarning, match="OnlinePrototypes.observe"):
            old.update({"image": x["image"], "text": x["text"]}, {"minilm": x["minilm"]})
        take(new, step)
    with (
        pytest.warns(FutureWarning, match="OnlinePrototypes.check"),
        pytest.raises(ValueError, match="names and widths of the first step"),
    ):
        old.check({"image": x["image"]})
    with pytest.warns(FutureWarning, match="OnlinePrototypes.labels"):
        labels = old.labels("minilm", x["minilm"])
    assert torch.equal(labels, new.labels(features(x), None)["minilm"])


def test_a_state_that_does_not_fit_changes_nothing():
    prototypes, other = online(), online()
    for step in range(WARMUP + 1):
        take(other, step)
    state = other.state_dict()
    state["terms"] = {key: {**term, "valid": term["valid"][:2]} for key, term in state["terms"].items()}
    before = repr(prototypes)
    with pytest.raises(ValueError, match="valid must have shape"):
        prototypes.load_state_dict(state)
    assert repr(prototypes) == before
    assert not prototypes.queue.features
