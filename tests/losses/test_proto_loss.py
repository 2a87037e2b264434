"""ProtoLoss on one process: the whole objective against its dense twin, and what it promises about state and absent terms."""

import copy

import dense
import pytest
import torch
from cases import TOLERANCE, assert_near, episode, leaf, make_term, unit, value_and_gradients
from helpers import in_new_process

from protoclip_losses import EpisodicClusterer, FeatureBank, InfoNCE, ProtoLoss, Prototypes, PrototypeTerm, TeacherAdapter
from protoclip_losses.functional import prototype_cross_entropy

KEYS = {"contrastive_loss", "proto_loss", "proto_external_loss"}
NAN = float("nan")


def batch(prototypes, size=11, width=5, names=("image", "text"), seed=500):
    """Encoder outputs, projected features and indices of a batch drawn from an episode."""
    z = unit(size, 8, seed), unit(size, 8, seed + 1)
    h = {name: unit(size, width, seed + 2 + i) for i, name in enumerate(names)}
    picked = torch.randint(len(prototypes.index), (size,), generator=torch.Generator().manual_seed(seed + 9))
    return z, h, prototypes.index[picked]


def call(loss, z, h, s, s_proto, index, **kwargs):
    others = {k: v for k, v in h.items() if k not in ("image", "text")}
    return loss(
        *z,
        s,
        image_features_projected=h["image"],
        text_features_projected=h["text"],
        logit_scale_proto=s_proto,
        index=index,
        features=others,
        **kwargs,
    )


def built(prototypes, **kwargs):
    loss = ProtoLoss(**kwargs)
    loss.set_prototypes(prototypes)
    return loss


def assert_equals_twin(prototypes, loss, twin_settings, names=("image", "text")):
    """Three parts, their sum, and the gradient of every input."""
    z, h, index = batch(prototypes, names=names)
    inputs = [*z, torch.tensor(10.0, dtype=torch.float64), torch.tensor(7.0, dtype=torch.float64), *h.values()]

    def ours(zi, zt, s, s_proto, *hs):
        return call(loss, (zi, zt), dict(zip(names, hs, strict=True)), s, s_proto, index, output_dict=True)

    def twin(zi, zt, s, s_proto, *hs):
        hs = dict(zip(names, hs, strict=True))
        return dense.objective((zi, zt), hs, s, s_proto, prototypes, index, **twin_settings)

    got, want = ours(*inputs), twin(*inputs)
    assert set(got) == KEYS
    for name in KEYS:
        assert got[name].shape == ()
        assert_near(got[name], torch.as_tensor(want[name], dtype=torch.float64))
    assert_near(call(loss, z, h, *inputs[2:4], index), sum(want.values()))
    for g, w in zip(
        value_and_gradients(lambda *x: sum(ours(*x).values()), *inputs)[1],
        value_and_gradients(lambda *x: sum(twin(*x).values()), *inputs)[1],
        strict=True,
    ):
        assert_near(g, torch.zeros_like(g) if w is None else w)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_temperature": 0.3},
        {"target_temperature": None},
        {"target_temperature": -1},
        {"target_temperature": 0.3, "external_target_temperature": 0.2},
        {"target_temperature": None, "external_target_temperature": 0.2},
        {"w_clip": 0.3, "w_proto": 0.2, "w_external": 0.7},
        {"w_clip": 2, "w_proto": 0, "w_external": 1},
        {"w_clip": 0},
        {"w_external": {"roberta": 0.4, "dino": 1.7}},
        {"w_external": {"roberta": 0.0, "dino": 1.7}},
    ],
    ids=str,
)
@pytest.mark.parametrize("empty", [(), (1, 4)])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_objective_with_two_external_teachers_equals_its_dense_twin(settings, empty, chunk_size):
    prototypes = episode(teachers=("roberta", "dino"), empty=empty)
    twin = {{"target_temperature": "temperature", "external_target_temperature": "external_temperature"}.get(k, k): v
            for k, v in settings.items()}  # fmt: skip
    twin = {k: None if k == "temperature" and v == -1 else v for k, v in twin.items()}
    assert_equals_twin(prototypes, built(prototypes, chunk_size=chunk_size, **settings), twin)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_a_third_modality_is_six_terms_and_no_new_code(temperature):
    prototypes = episode(modalities=("image", "text", "audio"), teachers=("roberta",))
    assert len(prototypes.terms) == 9
    loss = built(prototypes, target_temperature=temperature)
    assert_equals_twin(prototypes, loss, {"temperature": temperature}, names=("image", "text", "audio"))


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_without_back_translation_the_teachers_centroids_are_the_prototypes(temperature):
    prototypes = episode(teachers=("roberta",), teacher_width=5, empty=(1,))
    loss = built(prototypes, back_translation=False, target_temperature=temperature)
    assert_equals_twin(prototypes, loss, {"back_translation": False, "temperature": temperature})


def test_without_back_translation_a_teacher_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"back_translation=False.*'roberta'.*width 9.* 5"):
        built(episode(teachers=("roberta",)), back_translation=False)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("empty", [(), (1,)])
def test_normalize_prototypes(temperature, empty):
    prototypes = episode(teachers=("roberta",), empty=empty)
    norm = lambda x: x / x.norm(dim=1, keepdim=True).where(x.norm(dim=1, keepdim=True) > 0, 1)  # noqa: E731
    terms = {k: make_term(norm(t.prototypes), norm(t.teacher_centroids), t.labels, t.valid) for k, t in prototypes.terms.items()}
    normalised = Prototypes(prototypes.index, terms)
    loss = built(prototypes, normalize_prototypes=True, target_temperature=temperature)
    assert_equals_twin(normalised, loss, {"temperature": temperature})


def test_one_build_serves_losses_of_different_temperatures():
    prototypes = episode()
    hard, soft = built(prototypes, target_temperature=None), built(prototypes, target_temperature=0.3)
    assert_equals_twin(prototypes, hard, {"temperature": None})
    assert_equals_twin(prototypes, soft, {"temperature": 0.3})


def test_from_bank_and_teacher_to_loss():
    samples, names = 60, ("image", "text", "audio")
    bank = FeatureBank(torch.randperm(500)[:samples], dim=5, dtype=torch.float64)
    features = {name: unit(samples, 5, i) for i, name in enumerate(names)}
    bank.update(bank.index, features["image"], features["text"], audio=features["audio"])
    teacher = TeacherAdapter.from_tensor(unit(500, 7, 9, torch.float32))
    prototypes = EpisodicClusterer(num_prototypes=6).build(bank, {"minilm": teacher})
    assert_equals_twin(prototypes, built(prototypes, target_temperature=0.1), {"temperature": 0.1}, names)


def test_projected_features_default_to_the_plain_ones_and_the_scale_to_logit_scale():
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes)
    _, h, index = batch(prototypes)
    z = tuple(h.values())
    want = sum(dense.objective(z, h, 10.0, 10.0, prototypes, index).values())
    assert_near(loss(*z, 10.0, index=index), want)
    mixed = {"image": h["image"], "text": unit(11, 5, 77)}
    want = sum(dense.objective(z, mixed, 10.0, 10.0, prototypes, index).values())
    assert_near(loss(*z, 10.0, index=index, text_features_projected=mixed["text"]), want)


@pytest.mark.parametrize("s_proto", [None, 10, 10.0, torch.tensor(10.0), torch.tensor([10.0])])
def test_every_form_of_scale_is_the_same_scale(s_proto):
    prototypes = episode()
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    want = call(loss, z, h, 10.0, 10.0, index)
    assert torch.equal(call(loss, z, h, torch.tensor([10.0]), s_proto, index), want)


def test_gradcheck():
    prototypes = episode(teachers=("roberta",), empty=(1,))
    loss = built(prototypes, target_temperature=0.3)
    z, h, index = batch(prototypes, size=4)
    inputs = [leaf(x) for x in (*z, *h.values(), torch.tensor(3.0).double(), torch.tensor(2.0).double())]
    assert torch.autograd.gradcheck(
        lambda zi, zt, hi, ht, s, sp: call(loss, (zi, zt), {"image": hi, "text": ht}, s, sp, index), inputs
    )


# --- Prototypes: unset, none, keyed by sample


def test_prototypes_never_set_is_an_error_that_says_what_to_do():
    z, h, index = batch(episode())
    with pytest.raises(RuntimeError, match=r"prototypes are not set.*set_prototypes\(None\)"):
        call(ProtoLoss(), z, h, 10.0, 7.0, index)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_loss_without_prototypes_is_still_without(copied):
    z, h, index = batch(episode())
    with pytest.raises(RuntimeError, match="prototypes are not set"):
        call(copied(ProtoLoss()), z, h, 10.0, 7.0, index)


def test_prototypes_none_is_infonce_only():
    z, _, index = batch(episode())
    loss = built(None)
    want = InfoNCE()(*z, 10.0)
    for given in ({}, {"index": index}, {"index": torch.arange(11) + 10**6}):
        parts = loss(*z, 10.0, output_dict=True, **given)
        assert set(parts) == KEYS
        assert parts["contrastive_loss"] == want
        assert parts["proto_loss"] == parts["proto_external_loss"] == 0
        assert all(p.shape == () for p in parts.values())
        assert loss(*z, 10.0, **given) == want


def test_prototypes_can_be_taken_away_and_given_again():
    prototypes = episode()
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    full = call(loss, z, h, 10.0, 7.0, index)
    loss.set_prototypes(None)
    assert call(loss, z, h, 10.0, 7.0, index) == InfoNCE()(*z, 10.0)
    loss.set_prototypes(prototypes)
    assert call(loss, z, h, 10.0, 7.0, index) == full


def test_index_missing():
    z, h, _ = batch(episode())
    with pytest.raises(ValueError, match=r"index must be given"):
        call(built(episode()), z, h, 10.0, 7.0, None)


def test_index_of_a_sample_that_is_not_in_the_episode():
    prototypes = episode()
    z, h, index = batch(prototypes)
    for unknown in (-1, 1000, int(next(i for i in range(1000) if i not in prototypes.index))):
        index[3] = unknown
        with pytest.raises(IndexError, match=rf"index .*1 of 11.*sample {unknown}\b"):
            call(built(prototypes), z, h, 10.0, 7.0, index)


def test_labels_are_keyed_by_sample_index_in_any_order():
    prototypes = episode(teachers=("roberta",))
    order = torch.randperm(len(prototypes.index), generator=torch.Generator().manual_seed(3))
    shuffled = Prototypes(
        prototypes.index[order],
        {k: make_term(t.prototypes, t.teacher_centroids, t.labels[order], t.valid) for k, t in prototypes.terms.items()},
    )
    z, h, index = batch(prototypes)
    want = call(built(prototypes), z, h, 10.0, 7.0, index)
    assert call(built(shuffled), z, h, 10.0, 7.0, index) == want
    back = torch.arange(10, -1, -1)
    flipped = call(built(shuffled), [x[back] for x in z], {k: v[back] for k, v in h.items()}, 10.0, 7.0, index[back])
    assert_near(flipped, want)


def test_a_sample_whose_label_is_ignored_counts_in_no_term_of_that_teacher():
    prototypes = episode(teachers=("roberta",))
    z, h, index = batch(prototypes)
    row = {int(s): i for i, s in enumerate(prototypes.index)}
    for (_, teacher), t in prototypes.terms.items():
        if teacher == "text":
            t.labels[row[int(index[2])]] = -1
    assert_equals_twin(prototypes, built(prototypes), {})
    h["image"][2] = 0  # finite but another value: the term image from text does not see it, that from roberta does
    changed = call(built(prototypes, w_external=0), z, h, 10.0, 7.0, index)
    assert changed == call(built(prototypes, w_external=0), z, batch(prototypes)[1], 10.0, 7.0, index)


def test_with_every_label_ignored_prototype_terms_are_zero():
    prototypes = episode(teachers=("roberta",))
    for t in prototypes.terms.values():
        t.labels[:] = -1
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    h = {k: leaf(v) for k, v in h.items()}
    parts = call(loss, z, h, 10.0, 7.0, index, output_dict=True)
    assert parts["proto_loss"] == parts["proto_external_loss"] == 0
    (parts["proto_loss"] + parts["proto_external_loss"]).backward()
    assert all((v.grad == 0).all() for v in h.values())
    assert all(v == 0 for k, v in loss.metrics.items() if k.startswith("prototype"))


def test_a_cluster_that_only_the_teacher_has_is_ignored_for_that_student():
    # The student's own features of cluster 2 were all dropped: nothing to aim at, so its samples are left out of the mean.
    whole = episode()
    valid = torch.arange(6) != 2
    given = {k: make_term(t.prototypes, t.teacher_centroids, t.labels, valid) for k, t in whole.terms.items()}
    left_out = {
        k: make_term(t.prototypes, t.teacher_centroids, t.labels.where(t.labels != 2, -1), valid) for k, t in whole.terms.items()
    }
    assert any((t.labels == 2).any() for t in whole.terms.values())
    assert_equals_twin(Prototypes(whole.index, left_out), built(Prototypes(whole.index, given)), {})


# --- Weights and absent terms


def test_w_external_without_a_weight_for_a_teacher_names_it():
    with pytest.raises(ValueError, match=r"w_external.*'dino'.*'roberta'"):
        built(episode(teachers=("roberta", "dino")), w_external={"roberta": 1.0})


@pytest.mark.parametrize("teachers", [(), ("roberta",)])
def test_w_external_for_a_teacher_that_there_is_not_names_it(teachers):
    weights = dict.fromkeys((*teachers, "typo"), 1.0)
    with pytest.raises(ValueError, match=r"w_external must name external teachers, which are .*, got \['typo'\]"):
        built(episode(teachers=teachers), w_external=weights)


def test_features_of_an_unknown_teacher_are_named():
    prototypes = episode(teachers=("roberta",))
    z, h, index = batch(prototypes)
    with pytest.raises(ValueError, match=r"teacher_features must be of \['roberta'\], got \['typo'\]"):
        call(built(prototypes), z, h, 10.0, 7.0, index, teacher_features={"typo": unit(11, 9)})


@pytest.mark.parametrize("name", ["target_temperature", "external_target_temperature"])
@pytest.mark.parametrize("value", [-3, -0.01, float("nan")])
def test_a_negative_temperature_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        ProtoLoss(**{name: value})


@pytest.mark.parametrize("value", [True, "nccl", 0])
def test_a_process_group_that_is_none_is_an_error(value):
    for module in (ProtoLoss, InfoNCE):
        with pytest.raises(TypeError, match=r"process_group must be None .*, False .*torch.distributed.ProcessGroup"):
            module(process_group=value)


def test_settings_are_shown_checked_and_changed():
    loss = ProtoLoss(w_proto=0.25)
    assert "w_proto=0.25" in repr(loss)
    assert "not set" in repr(loss)
    assert loss.w_proto == loss.settings.w_proto == 0.25
    loss.w_proto = 2
    assert loss.settings.w_proto == 2
    with pytest.raises(ValueError, match="w_proto must be finite and not negative, got -1"):
        loss.w_proto = -1
    with pytest.raises(AttributeError):
        _ = loss.w_typo


def test_terms_of_a_teacher_must_share_its_labels():
    prototypes = episode(teachers=("roberta",))
    term = prototypes.terms["text", "roberta"]
    other = make_term(term.prototypes, term.teacher_centroids, term.labels.roll(1), term.valid)
    with pytest.raises(ValueError, match=r"labels of teacher 'roberta' must be the same for all its students.*'text'"):
        Prototypes(prototypes.index, {**prototypes.terms, ("text", "roberta"): other})


def test_0_6_form_of_a_term_and_of_teacher_features_warn_and_work():
    prototypes = episode(teachers=("roberta",))
    z, h, index = batch(prototypes)
    terms = {}
    for key, t in prototypes.terms.items():
        with pytest.warns(FutureWarning, match="PrototypeTerm"):
            terms[key] = PrototypeTerm(t.prototypes, t.teacher_centroids, t.labels, valid=t.valid)
    old = built(Prototypes(prototypes.index, terms))
    with pytest.warns(FutureWarning, match="teacher_features"):
        value = call(old, z, h, 10.0, 7.0, index, teacher_features=unit(11, 9))
    assert torch.equal(value, call(built(prototypes), z, h, 10.0, 7.0, index))


def test_parts_sum_to_the_scalar_form():
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes, w_clip=0.5, w_proto=0.3)
    z, h, index = batch(prototypes)
    total, parts = call(loss, z, h, 10.0, 7.0, index), call(loss, z, h, 10.0, 7.0, index, output_dict=True)
    assert isinstance(total, torch.Tensor)
    assert total.shape == ()
    assert_near(total, sum(parts.values()))


ABSENT = {
    "w_clip is 0": ({"w_clip": 0}, ("contrastive_loss",)),
    "w_proto is 0": ({"w_proto": 0}, ("proto_loss",)),
    "w_external is 0": ({"w_external": 0}, ("proto_external_loss",)),
    "all are 0": ({"w_clip": 0, "w_proto": 0.0, "w_external": {"roberta": 0}}, tuple(KEYS)),
}


@pytest.mark.parametrize(("settings", "absent"), ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("part", sorted(KEYS))
def test_every_tensor_passed_in_has_a_gradient_from_every_part(settings, absent, part):
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes, **settings)
    z, h, index = batch(prototypes, names=("image", "text", "audio"))
    bias, teacher = leaf(torch.tensor(-3.0)), leaf(unit(11, 9))
    s, s_proto = leaf(torch.tensor([10.0])), leaf(torch.tensor(7.0))
    z, h = [leaf(x) for x in z], {k: leaf(v) for k, v in h.items()}
    parts = call(loss, z, h, s, s_proto, index, logit_bias=bias, teacher_features={"roberta": teacher}, output_dict=True)
    parts[part].backward()
    clip, projected = (*z, s), (h["image"], h["text"], s_proto)
    for x in (*clip, *projected, h["audio"], bias, teacher):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert x.grad.dtype == x.dtype
    zero = [bias, teacher, h["audio"]]
    zero += projected if part == "contrastive_loss" or part in absent else []
    zero += clip if part != "contrastive_loss" or part in absent else []
    for x in (*clip, *projected, h["audio"], bias, teacher):
        is_zero = bool((x.grad == 0).all())
        assert is_zero == any(x is y for y in zero)


@pytest.mark.filterwarnings("ignore:teacher_features as a single tensor:FutureWarning")
@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"roberta": x}], ids=["tensor", "mapping"])
def test_teacher_features_get_a_zero_gradient(form):
    prototypes = episode(teachers=("roberta",))
    z, h, index = batch(prototypes)
    teacher = leaf(unit(11, 9))
    call(built(prototypes), z, h, 10.0, 7.0, index, teacher_features=form(teacher)).backward()
    assert (teacher.grad == 0).all()


def test_in_warm_up_every_tensor_passed_in_has_a_gradient():
    z, h, index = batch(episode(), names=("image", "text", "audio"))
    z, h, s_proto, bias = [leaf(x) for x in z], {k: leaf(v) for k, v in h.items()}, leaf(torch.tensor(7.0)), leaf(torch.zeros(1))
    call(built(None), z, h, 10.0, s_proto, index, logit_bias=bias).backward()
    assert all((x.grad != 0).any() for x in z)
    assert all((x.grad == 0).all() for x in (*h.values(), s_proto, bias))


def test_nan_in_the_inputs_of_a_weightless_infonce_leaks_into_neither_value_nor_gradient():
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes, w_clip=0)
    z, h, index = batch(prototypes)
    want = call(loss, z, h, 10.0, 7.0, index)
    image, text, s = leaf(z[0] * NAN), leaf(z[1]), leaf(torch.tensor(NAN))
    h = {k: leaf(v) for k, v in h.items()}
    got = call(loss, (image, text), h, s, 7.0, index)
    got.backward()
    assert got == want
    assert all((x.grad == 0).all() for x in (image, text, s))
    assert all(torch.isfinite(v.grad).all() for v in h.values())


@pytest.mark.parametrize("settings", [{"w_proto": 0, "w_external": 0}, None], ids=["weightless", "warm-up"])
def test_nan_in_the_inputs_of_absent_prototype_terms_leaks_into_neither_value_nor_gradient(settings):
    prototypes = episode(teachers=("roberta",))
    loss = built(None) if settings is None else built(prototypes, **settings)
    z, h, index = batch(prototypes)
    want = call(loss, z, h, 10.0, 7.0, index)
    z, h, s_proto = [leaf(x) for x in z], {k: leaf(v * NAN) for k, v in h.items()}, leaf(torch.tensor(NAN))
    got = call(loss, z, h, 10.0, s_proto, index)
    got.backward()
    assert got == want
    assert all((x.grad == 0).all() for x in (*h.values(), s_proto))
    assert all(torch.isfinite(x.grad).all() for x in z)


def test_nan_in_a_bias_or_a_teacher_leaks_into_neither_value_nor_gradient():
    prototypes = episode(teachers=("roberta",))
    z, h, index = batch(prototypes)
    bias, teacher = leaf(torch.tensor(NAN)), leaf(unit(11, 9) * NAN)
    want = call(built(prototypes), z, h, 10.0, 7.0, index)
    got = call(built(prototypes), z, h, 10.0, 7.0, index, logit_bias=bias, teacher_features={"roberta": teacher})
    got.backward()
    assert got == want
    assert bias.grad == 0
    assert (teacher.grad == 0).all()


def test_without_gradients_the_value_is_the_same():
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    want = call(loss, [leaf(x) for x in z], {k: leaf(v) for k, v in h.items()}, 10.0, 7.0, index)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = call(loss, [leaf(x) for x in z], {k: leaf(v) for k, v in h.items()}, 10.0, 7.0, index)
        assert not value.requires_grad
        assert_near(value, want)


def test_prototypes_made_in_inference_mode_can_be_trained_against():
    with torch.inference_mode():
        prototypes = episode(teachers=("roberta",), empty=(1,))
        loss = built(prototypes, target_temperature=0.3)
    assert_equals_twin(episode(teachers=("roberta",), empty=(1,)), loss, {"temperature": 0.3})


# --- Metrics


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_metrics_are_detached_and_equal_the_dense_argmax(chunk_size):
    prototypes = episode(teachers=("roberta",), empty=(1,))
    row = {int(s): i for i, s in enumerate(prototypes.index)}
    loss = built(prototypes, chunk_size=chunk_size)
    z, h, index = batch(prototypes, size=30)
    for t in prototypes.terms.values():
        t.labels[[row[int(i)] for i in index[:3]]] = -1
    loss.set_prototypes(prototypes)
    call(loss, [leaf(x) for x in z], {k: leaf(v) for k, v in h.items()}, 10.0, leaf(torch.tensor(7.0)), index)
    want = {"contrastive_accuracy": (z[0] @ z[1].T).argmax(1) == torch.arange(30)}
    for (student, teacher), t in prototypes.terms.items():
        labels = t.labels[[row[int(i)] for i in index]]
        guess = (h[student] @ t.prototypes.T).masked_fill(~t.valid, -torch.inf).argmax(1)
        want[f"prototype_accuracy/{student}/{teacher}"] = (guess == labels)[labels >= 0]
    assert set(loss.metrics) == set(want)
    for name, value in loss.metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert_near(value, want[name].double().mean())


def test_metrics_are_those_of_the_last_call():
    prototypes = episode()
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    call(loss, z, h, 10.0, 7.0, index)
    assert any(name.startswith("prototype") for name in loss.metrics)
    loss.set_prototypes(None)
    call(loss, z, h, 10.0, 7.0, index)
    assert not any(name.startswith("prototype") for name in loss.metrics)


# --- Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_is_at_least_float32_and_near_the_truth(dtype):
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes, target_temperature=0.3)
    z, h, index = batch(prototypes)
    z, h = [x.to(dtype) for x in z], {k: v.to(dtype) for k, v in h.items()}
    parts = call(loss, z, h, 10.0, 7.0, index, output_dict=True)
    want = dense.objective(z, h, 10.0, 7.0, prototypes, index, temperature=0.3)
    for name in KEYS:
        assert parts[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(parts[name], want[name], TOLERANCE[dtype])


# --- State


def test_prototypes_are_neither_parameters_nor_buffers_and_half_leaves_them():
    prototypes = episode(teachers=("roberta",))
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    want = call(loss, z, h, 10.0, 7.0, index)
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    assert call(loss.half(), z, h, 10.0, 7.0, index) == want
    assert call(loss.to(torch.bfloat16), z, h, 10.0, 7.0, index) == want


CONTINUE = """
import sys, torch
from protoclip_losses import ProtoLoss
given = torch.load(sys.argv[1], weights_only=True)
model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "loss": ProtoLoss(target_temperature=0.3)})
model.load_state_dict(given["state"], strict=True)
parts = model["loss"](*given["args"], **given["kwargs"], output_dict=True)
torch.save(parts, sys.argv[2])
"""


def test_a_saved_loss_goes_on_in_a_new_process(tmp_path):
    prototypes = episode(teachers=("roberta",), empty=(1,))
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "loss": built(prototypes, target_temperature=0.3)})
    z, h, index = batch(prototypes)
    args = (*z, 10.0)
    kwargs = {"image_features_projected": h["image"], "text_features_projected": h["text"], "index": index}
    saved, done = tmp_path / "state.pt", tmp_path / "done.pt"
    torch.save({"state": model.state_dict(), "args": args, "kwargs": kwargs}, saved)
    in_new_process(CONTINUE, saved, done)
    assert torch.load(done, weights_only=True) == model["loss"](*args, **kwargs, output_dict=True)


def test_state_with_prototypes_none_is_none_again(tmp_path):
    z, *_ = batch(episode())
    torch.save(built(None).state_dict(), tmp_path / "state.pt")
    loss = built(episode())
    loss.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert loss(*z, 10.0) == InfoNCE()(*z, 10.0)


def test_state_without_prototypes_is_without_again(tmp_path):
    z, *_ = batch(episode())
    torch.save(ProtoLoss().state_dict(), tmp_path / "state.pt")
    loss = built(episode())
    loss.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match="prototypes are not set"):
        loss(*z, 10.0)


def test_a_checkpoint_from_before_the_loss_was_there_loads():
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2)})
    state = model.state_dict()
    model["loss"] = built(episode())
    model.load_state_dict(state, strict=True)
    assert model["loss"].prototypes is not None
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        model.load_state_dict({"head.weight": state["head.weight"]}, strict=True)


def test_a_copy_has_prototypes_of_its_own():
    prototypes = episode()
    loss = built(prototypes)
    z, h, index = batch(prototypes)
    want = call(loss, z, h, 10.0, 7.0, index)
    other = copy.deepcopy(loss)
    other.prototypes.terms["image", "text"].prototypes.zero_()
    other.set_prototypes(None)
    assert torch.equal(call(loss, z, h, 10.0, 7.0, index), want)


def test_a_loaded_loss_takes_the_settings_of_the_loss_that_loads():
    prototypes = episode()
    hard, soft = ProtoLoss(target_temperature=None), built(prototypes, target_temperature=0.3)
    hard.load_state_dict(soft.state_dict())
    assert_equals_twin(prototypes, hard, {"temperature": None})


def test_a_term_is_prototype_cross_entropy():
    prototypes = episode(modalities=("image", "text"))
    only = Prototypes(prototypes.index, {("image", "text"): prototypes.terms["image", "text"]})
    z, h, index = batch(only)
    term = only.terms["image", "text"]
    labels = term.labels[only.positions(index)]
    want = prototype_cross_entropy(h["image"], term.prototypes, labels, 7.0)
    # text is not a student here, so that it is an external teacher of image
    parts = call(built(only), z, h, 10.0, 7.0, index, output_dict=True)
    assert_near(parts["proto_external_loss"], want)
    assert parts["proto_loss"] == 0
