"""What stays the same, whatever the inputs: properties of the losses over random sizes, scales, masks and labels."""

import math

import dense
import torch
from cases import assert_near, term, unit, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip_losses import PrototypeLoss
from protoclip_losses.functional import back_translate, info_nce, prototype_cross_entropy, soft_targets

quick = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def terms(draw, teacher_width=None):
    """A term with some clusters empty and some labels ignored, soft (a temperature) or hard (None)."""
    prototypes = draw(st.integers(1, 12))
    empty = draw(st.sets(st.integers(0, prototypes - 1), max_size=prototypes - 1))
    t = term(
        batch=draw(st.integers(1, 20)),
        prototypes=prototypes,
        width=draw(st.integers(1, 6)),
        teacher_width=teacher_width or draw(st.integers(1, 6)),
        scale=draw(st.floats(0, 100, allow_subnormal=False)),
        empty=empty,
        seed=draw(st.integers(0, 10**6)),
    )
    t.a[torch.rand(len(t.a), generator=torch.Generator().manual_seed(len(empty))) < draw(st.sampled_from([0.0, 0.3]))] = -1
    return t, draw(st.sampled_from([None, 0.01, 0.3, 5.0]))


@st.composite
def pairs(draw):
    batch, width, seed = draw(st.integers(1, 20)), draw(st.integers(1, 6)), draw(st.integers(0, 10**6))
    return unit(batch, width, seed), unit(batch, width, seed + 1), draw(st.floats(0, 100, allow_subnormal=False))


def loss_of(t, temperature, chunk_size=None):
    M = None if temperature is None else soft_targets(t.C, t.P, temperature, valid=t.valid)
    return prototype_cross_entropy(t.h, t.P, t.a, t.s, targets=M, valid=t.valid, chunk_size=chunk_size)


def permutation(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=0):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def near(got, want):
    """Sums in another order, of logits up to 100."""
    assert abs(got - want) <= 1e-11


@quick
@given(terms())
def test_a_term_equals_its_dense_form(case):
    t, temperature = case
    near(loss_of(t, temperature), dense.prototype_cross_entropy(t.h, t.P, t.a, t.s, t.C, temperature, t.valid))


@quick
@given(pairs())
def test_infonce_equals_its_dense_form(case):
    near(info_nce(*case), dense.info_nce(*case))


@quick
@given(terms(), st.integers(1, 30))
def test_any_chunk_size_agrees_in_value_and_gradients(case, chunk_size):
    t, temperature = case
    M = t.P if temperature is None else soft_targets(t.C, t.P, temperature, valid=t.valid)

    def run(chunk):
        def loss(h, P, s):
            return prototype_cross_entropy(
                h, P, t.a, s, targets=None if temperature is None else M, valid=t.valid, chunk_size=chunk
            )

        return value_and_gradients(loss, t.h, t.P, t.s)

    (value, gradients), (whole, all_at_once) = run(chunk_size), run(None)
    near(value, whole)
    for got, want in zip(gradients, all_at_once, strict=True):
        assert (got - want).abs().max() <= 1e-10


@quick
@given(pairs(), st.integers(1, 30))
def test_any_chunk_size_of_infonce_agrees_in_value_and_gradients(case, chunk_size):
    case = (*case[:2], torch.tensor(case[2], dtype=torch.float64))
    value, gradients = value_and_gradients(lambda *x: info_nce(*x, chunk_size=chunk_size), *case)
    whole, all_at_once = value_and_gradients(info_nce, *case)
    near(value, whole)
    for got, want in zip(gradients, all_at_once, strict=True):
        assert (got - want).abs().max() <= 1e-10


@quick
@given(terms())
def test_permuting_samples_changes_nothing(case):
    t, temperature = case
    want, order = loss_of(t, temperature), permutation(len(t.h))
    t.h, t.a = t.h[order], t.a[order]
    near(loss_of(t, temperature), want)


@quick
@given(pairs())
def test_permuting_pairs_changes_nothing(case):
    image, text, s = case
    order = permutation(len(image))
    near(info_nce(image[order], text[order], s), info_nce(image, text, s))


@quick
@given(pairs())
def test_exchanging_the_modalities_changes_nothing(case):
    image, text, s = case
    near(info_nce(text, image, s), info_nce(image, text, s))


@quick
@given(terms())
def test_relabelling_clusters_changes_nothing(case):
    t, temperature = case
    want, order = loss_of(t, temperature), permutation(len(t.P))
    t.P, t.C, t.valid = t.P[order], t.C[order], t.valid[order]
    t.a = torch.where(t.a >= 0, order.argsort()[t.a], -1)
    near(loss_of(t, temperature), want)


@quick
@given(terms())
def test_rotating_the_students_space_changes_nothing(case):
    t, temperature = case
    want, turn = loss_of(t, temperature), rotation(t.h.shape[1])
    t.h, t.P = t.h @ turn, t.P @ turn
    near(loss_of(t, temperature), want)


@quick
@given(terms())
def test_rotating_the_teachers_space_changes_nothing(case):
    t, temperature = case
    want = loss_of(t, temperature)
    t.C = t.C @ rotation(t.C.shape[1])
    near(loss_of(t, temperature), want)


@quick
@given(pairs())
def test_rotating_both_modalities_changes_nothing(case):
    image, text, s = case
    turn = rotation(image.shape[1])
    near(info_nce(image @ turn, text @ turn, s), info_nce(image, text, s))


@quick
@given(terms(), st.integers(1, 3))
def test_duplicating_the_batch_changes_no_mean_and_shares_out_the_gradient(case, copies):
    t, temperature = case

    def loss(h, s, labels):
        M = None if temperature is None else soft_targets(t.C, t.P, temperature, valid=t.valid)
        return prototype_cross_entropy(h, t.P, labels, s, targets=M, valid=t.valid)

    one, (h, s) = value_and_gradients(lambda h, s: loss(h, s, t.a), t.h, t.s)
    many, (h_many, s_many) = value_and_gradients(lambda h, s: loss(h, s, t.a.repeat(copies)), t.h.repeat(copies, 1), t.s)
    near(many, one)
    near(s_many, s)
    assert (h_many - (h / copies).repeat(copies, 1)).abs().max() <= 1e-11


@quick
@given(pairs(), st.integers(1, 4))
def test_duplicating_the_pairs_adds_the_log_of_the_copies(case, copies):
    image, text, s = case
    near(info_nce(image.repeat(copies, 1), text.repeat(copies, 1), s), info_nce(image, text, s) + math.log(copies))


@quick
@given(terms())
def test_a_duplicate_prototype_splits_its_mass(case):
    t, _ = case
    M = soft_targets(t.C, t.P, 0.3, valid=t.valid)

    def loss(copies):
        return lambda P: prototype_cross_entropy(t.h, P, t.a, t.s, targets=M.repeat(copies, 1), valid=t.valid.repeat(copies))

    one, (once,) = value_and_gradients(loss(1), t.P)
    two, (twice,) = value_and_gradients(loss(2), t.P.repeat(2, 1))
    near(two, one + (math.log(2) if (t.a >= 0).any() else 0))  # each class is halved, its target is not
    assert (twice - once.repeat(2, 1) / 2).abs().max() <= 1e-11  # and the two halves are pushed half as hard


@quick
@given(terms())
def test_a_duplicate_centroid_leaves_soft_targets_as_they_were(case):
    t, _ = case
    k = int(t.valid.nonzero()[0])
    more = torch.cat([t.C, t.C[k : k + 1]]), torch.cat([t.P, t.P[k : k + 1]]), torch.cat([t.valid, t.valid.new_ones(1)])
    got = soft_targets(more[0], more[1], 0.3, valid=more[2])
    assert_near(got[-1], got[k])
    mass = soft_targets(more[0], torch.eye(len(more[0]), dtype=torch.float64), 0.3, valid=more[2])
    assert_near(mass[:, -1], mass[:, k])


@quick
@given(terms(teacher_width=4))
def test_soft_targets_become_hard_as_the_temperature_falls(case):
    t, _ = case  # unit centroids, in a width where no two are equal
    near(loss_of(t, 1e-6), loss_of(t, None))
    near(PrototypeLoss(1e-6)(t.h, t.P, t.C, t.a, t.s, valid=t.valid), PrototypeLoss(None)(t.h, t.P, t.C, t.a, t.s, valid=t.valid))


@quick
@given(terms())
def test_soft_targets_become_uniform_as_the_temperature_rises(case):
    t, _ = case
    mean = t.P[t.valid].mean(0)
    assert (soft_targets(t.C, t.P, 1e12, valid=t.valid) - mean).abs().max() <= 1e-11


@quick
@given(terms(), st.integers(1, 5))
def test_empty_clusters_take_no_mass(case, more):
    t, temperature = case
    want = loss_of(t, temperature)
    t.P = torch.cat([t.P, 1e6 * unit(more, t.P.shape[1], 5)])
    t.C = torch.cat([t.C, 1e6 * unit(more, t.C.shape[1], 6)])
    t.valid = torch.cat([t.valid, t.valid.new_zeros(more)])
    near(loss_of(t, temperature), want)


@quick
@given(terms(), st.integers(1, 5))
def test_ignored_rows_count_for_nothing(case, more):
    t, temperature = case
    want = loss_of(t, temperature)
    t.h = torch.cat([torch.full((more, t.h.shape[1]), float("nan")), t.h])
    t.a = torch.cat([torch.full((more,), -1), t.a])
    near(loss_of(t, temperature), want)


@quick
@given(terms(), st.floats(0.1, 10))
def test_only_the_product_of_scale_and_features_matters(case, factor):
    t, temperature = case
    want = loss_of(t, temperature)
    t.h, t.s = t.h * factor, t.s / factor
    near(loss_of(t, temperature), want)
    t.P, t.s = t.P / factor, t.s * factor
    near(loss_of(t, temperature), want)


@quick
@given(terms(), st.floats(0.1, 10))
def test_only_centroids_squared_over_temperature_matter(case, factor):
    t, _ = case
    a, b = soft_targets(t.C, t.P, 0.3, valid=t.valid), soft_targets(factor * t.C, t.P, 0.3 * factor**2, valid=t.valid)
    assert (a - b).abs().max() <= 1e-11


@quick
@given(pairs(), st.floats(0.1, 10))
def test_only_the_product_of_scale_and_both_modalities_matters(case, factor):
    image, text, s = case
    near(info_nce(image * factor, text / factor, s), info_nce(image, text, s))
    near(info_nce(image * factor, text, s / factor), info_nce(image, text, s))


@quick
@given(terms())
def test_moving_all_prototypes_and_targets_by_one_vector_changes_nothing(case):
    t, _ = case
    M, shift = soft_targets(t.C, t.P, 0.3, valid=t.valid), unit(1, t.h.shape[1], 7)
    want = prototype_cross_entropy(t.h, t.P, t.a, t.s, targets=M, valid=t.valid)
    near(prototype_cross_entropy(t.h, t.P + shift, t.a, t.s, targets=M + shift, valid=t.valid), want)


@quick
@given(terms())
def test_at_scale_zero_the_loss_is_the_log_of_the_number_of_prototypes(case):
    t, temperature = case
    t.s = torch.tensor(0.0, dtype=torch.float64)
    near(loss_of(t, temperature), math.log(int(t.valid.sum())) if (t.a >= 0).any() else 0)


@quick
@given(pairs())
def test_infonce_at_scale_zero_is_the_log_of_the_batch(case):
    near(info_nce(*case[:2], 0.0), math.log(len(case[0])))


@quick
@given(terms())
def test_the_loss_is_not_negative_and_soft_is_not_below_the_targets_entropy(case):
    t, temperature = case
    loss = loss_of(t, temperature)
    assert loss >= -1e-11
    if temperature is not None and (t.a >= 0).any():
        y = dense.teacher_distribution(t.C, temperature, t.valid)[t.a[t.a >= 0]]
        assert loss >= torch.special.entr(y).sum(1).mean() - 1e-11


@quick
@given(terms())
def test_the_term_is_linear_in_its_targets(case):
    t, _ = case
    M1, M2 = unit(len(t.P), t.P.shape[1], 1), unit(len(t.P), t.P.shape[1], 2)
    one, two, mean = (prototype_cross_entropy(t.h, t.P, t.a, t.s, targets=M, valid=t.valid) for M in (M1, M2, (M1 + M2) / 2))
    near(mean, (one + two) / 2)


@quick
@given(terms())
def test_raw_centroids_and_built_targets_agree(case):
    t, temperature = case
    near(PrototypeLoss(temperature)(t.h, t.P, t.C, t.a, t.s, valid=t.valid), loss_of(t, temperature))


@quick
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_back_translation_follows_permutation_relabelling_and_rotation(samples, prototypes, width, seed):
    labels, features = (
        torch.randint(-1, prototypes, (samples,), generator=torch.Generator().manual_seed(seed)),
        unit(samples, width, seed),
    )
    P, counts = back_translate(labels, features, prototypes)
    assert counts.sum() == (labels >= 0).sum()
    order = permutation(samples)
    assert (back_translate(labels[order], features[order], prototypes)[0] - P).abs().max() <= 1e-12
    names = permutation(prototypes)
    renamed = torch.where(labels >= 0, names.argsort()[labels], -1)
    assert torch.equal(back_translate(renamed, features, prototypes)[0], P[names])
    turn = rotation(width)
    assert (back_translate(labels, features @ turn, prototypes)[0] - P @ turn).abs().max() <= 1e-12
    assert (back_translate(labels.repeat(2), features.repeat(2, 1), prototypes)[0] - P).abs().max() <= 1e-12
