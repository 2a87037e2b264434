"""Error budgets: against float64 on the same inputs, never worse than the plain expression in the same dtype, also at the edges.

A single number can be right by luck, so errors are root mean squares over several draws.
"""

import dense
import pytest
import torch
from cases import assert_near, episode, integers, leaf, unit, value_and_gradients

from protoclip_losses import InfoNCE, ProtoLoss, PrototypeLoss
from protoclip_losses.functional import info_nce, prototype_cross_entropy, sigmoid_pair_loss, soft_targets

pytestmark = pytest.mark.usefixtures("form")

DRAWS = range(6)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32 = 1e-5  # what the library promises of float32, relative
SLACK = 1.25  # roundings of another order


def near_ties(rows, width, seed):
    """Rows of norm one that differ in the third digit."""
    x = unit(1, width, seed) + 1e-3 * unit(rows, width, seed + 1)
    return x / x.norm(dim=1, keepdim=True)


def octave(draw):
    """Scales from 100 down to 55."""
    return 100 * 2 ** (-draw / len(DRAWS))


def preferring_another(draw):
    """Images near u but for the first, whose text is u itself; other texts are far from all images."""
    u, v = torch.linalg.qr(unit(16, 2, draw))[0].T[:, None]
    images, texts = 0.2 * unit(59, 16, draw + 1), 0.2 * unit(59, 16, draw + 2)
    return torch.cat([-v, u + images]), torch.cat([u, 0.87 * v - 0.5 * u + texts]), 70.0


# name: (features, prototypes, labels, scale) of a draw
TERMS = {
    "plain": lambda i: (unit(48, 16, i), unit(70, 16, i + 100), integers(70, 48, i), 14.3),
    # Where a low dtype's spacing doubles is at another logit for the naive form, which scales before its product: hence octave().
    "scale 100": lambda i: (unit(48, 16, i), unit(70, 16, i + 100), integers(70, 48, i), octave(i)),
    "logits of plus and minus 100": lambda i: (
        *(torch.cat([unit(35, 16, i), -unit(35, 16, i)]), torch.cat([unit(35, 16, i), -unit(35, 16, i)])),
        *(integers(70, 70, i), 100.0),
    ),
    "near ties": lambda i: (unit(48, 16, i), near_ties(70, 16, i + 100), integers(70, 48, i), 100.0),
    "duplicate rows": lambda i: (unit(6, 16, i).repeat(8, 1), unit(7, 16, i + 100).repeat(10, 1), integers(70, 48, i), 50.0),
    "one dominates": lambda i: (unit(70, 16, i), unit(70, 16, i), torch.arange(70), 50.0),
    "unequal norms": lambda i: (
        unit(48, 16, i),
        unit(70, 16, i + 100) * torch.logspace(-2, 0.5, 70, dtype=torch.float64)[:, None],
        *(integers(70, 48, i), 30.0),
    ),
}
PAIRS = {
    "plain": lambda i: (unit(60, 16, i), unit(60, 16, i + 100), 14.3),
    "scale 100": lambda i: (unit(60, 16, i), unit(60, 16, i + 100), octave(i)),
    "logits of plus and minus 100": lambda i: (
        *(torch.cat([unit(30, 16, i), -unit(30, 16, i)]), torch.cat([unit(30, 16, i), -unit(30, 16, i)])),
        100.0,
    ),
    "near ties": lambda i: (near_ties(60, 16, i), near_ties(60, 16, i + 100), 100.0),
    "duplicate rows": lambda i: (unit(6, 16, i).repeat(10, 1), unit(6, 16, i + 100).repeat(10, 1), 50.0),
    "rows of unequal norm": lambda i: (
        unit(60, 16, i) * torch.logspace(-2, 0, 60, dtype=torch.float64)[:, None],
        *(unit(60, 16, i + 100), 100.0),
    ),
    "columns of unequal norm": lambda i: (
        unit(60, 16, i),
        *(unit(60, 16, i + 100) * torch.logspace(-2, 0, 60, dtype=torch.float64)[:, None], 100.0),
    ),
    "a column that nothing is near": lambda i: (
        torch.cat([unit(1, 16, i) + 0.3 * unit(59, 16, i + 1), -unit(1, 16, i)]),
        *(unit(60, 16, i + 100), 100.0),
    ),
    "a text that falls away from all images": lambda i: (
        unit(1, 16, i) + 0.2 * unit(60, 16, i + 1),
        *(torch.cat([unit(1, 16, i) + 0.2 * unit(59, 16, i + 2), 0.15 * (1 - i) * unit(1, 16, i)]), 70.0),
    ),
    "all images prefer a text that is not theirs": lambda i: preferring_another(i),
    "one dominates": lambda i: (unit(60, 16, i), unit(60, 16, i), 50.0),
}

# Where features are nearly parallel, one rounding of a low dtype moves all logits: which form is lucky depends on the draw.
NEARLY_PARALLEL = {
    "near ties",
    "a column that nothing is near",
    "a text that falls away from all images",
    "all images prefer a text that is not theirs",
}


def judged(names):
    return [(name, dtype) for name in names for dtype in DTYPES if dtype == torch.float32 or name not in NEARLY_PARALLEL]


def naive_term(h, P, a, s, C=None, temperature=None):
    """What one writes without this library, all of it in the dtype of the inputs."""
    log_p = (s.to(h.dtype) * h @ P.T).log_softmax(1)
    if temperature is None:
        return torch.nn.functional.nll_loss(log_p, a)
    return -((C @ C.T / temperature).softmax(1)[a] * log_p).sum(1).mean()


def naive_info_nce(image, text, s):
    logits, own = s.to(image.dtype) * image @ text.T, torch.arange(len(image))
    return (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2


def assert_within_budget(dtype, draws):
    """``draws`` of (ours, naive, truth, inputs): the RMS error of value and of each gradient, against the naive one's."""
    errors = []
    for ours, naive, truth, inputs in draws:
        want, gradients = value_and_gradients(truth, *(x.double() for x in inputs))
        row = []
        for function in (ours, naive):
            value, got = value_and_gradients(function, *inputs)
            row.append([(a.double() - b).norm() ** 2 for a, b in zip((value, *got), (want, *gradients), strict=True)])
        row.append([x.norm() ** 2 for x in (want, *gradients)])
        errors.append(row)
    ours, naive, size = torch.tensor(errors, dtype=torch.float64).mean(0).sqrt()
    # Where a gradient is the small difference of large numbers, a few roundings of those are forgiven.
    scale, batch = inputs[-1].item(), len(inputs[0])
    rounding = 4 * torch.finfo(torch.float32).eps * torch.tensor([scale, *[scale / batch**0.5] * (len(inputs) - 1), 1.0])
    allowed = torch.maximum(SLACK * naive + rounding, FLOAT32 * size)
    assert (ours <= allowed).all(), f"relative errors {(ours / size).tolist()}, naive {(naive / size).tolist()}"
    return ours / size


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize(("name", "dtype"), judged(TERMS))
def test_a_term_is_no_worse_than_the_naive_one(name, temperature, dtype):
    def draw(seed):
        h, P, a, s = TERMS[name](seed)
        C = unit(len(P), 8, seed + 200).to(dtype)
        inputs = h.to(dtype), P.to(dtype), torch.tensor(s)
        # P is a constant of the dense soft form's M here, so that its gradient is checked with hard targets alone
        if temperature is None:
            return (
                lambda h, P, s: prototype_cross_entropy(h, P, a, s),
                lambda h, P, s: naive_term(h, P, a, s),
                lambda h, P, s: dense.prototype_cross_entropy(h, P, a, s),
                inputs,
            )
        P = inputs[1]
        M = soft_targets(C, P, temperature)
        return (
            lambda h, s: prototype_cross_entropy(h, P, a, s, targets=M),
            lambda h, s: naive_term(h, P, a, s, C, temperature),
            lambda h, s: dense.prototype_cross_entropy(h, P, a, s, C, temperature),
            (inputs[0], inputs[2]),
        )

    assert_within_budget(dtype, map(draw, DRAWS))


@pytest.mark.parametrize(("name", "dtype"), judged(PAIRS))
def test_infonce_is_no_worse_than_the_naive_one(name, dtype):
    def draw(seed):
        image, text, s = PAIRS[name](seed)
        return info_nce, naive_info_nce, dense.info_nce, (image.to(dtype), text.to(dtype), torch.tensor(s))

    assert_within_budget(dtype, map(draw, DRAWS))


# Duplicate rows have 42 different logits, too few for bfloat16's luck to even out.
@pytest.mark.parametrize(("name", "dtype"), [x for x in judged(PAIRS) if x != ("duplicate rows", torch.bfloat16)])
def test_the_sigmoid_loss_is_no_worse_than_the_naive_one(name, dtype):
    def naive(image, text, b, s):
        sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
        logits = s.to(image.dtype) * image @ text.T + b.to(image.dtype)
        return -torch.nn.functional.logsigmoid(sign * logits).sum() / len(image)

    def draw(seed):
        image, text, s = PAIRS[name](seed)
        s = s * 2 ** (-seed / 32)  # where a low dtype's spacing doubles must not decide
        inputs = image.to(dtype), text.to(dtype), torch.tensor(-s / 2), torch.tensor(s)
        return (
            lambda image, text, b, s: sigmoid_pair_loss(image, text, s, b),
            naive,
            lambda image, text, b, s: dense.sigmoid_pair_loss(image, text, s, b),
            inputs,
        )

    assert_within_budget(dtype, map(draw, range(32)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_centroids_are_no_worse_than_the_naive_form(dtype):
    def draw(seed):
        h, P, a, s = TERMS["plain"](seed)
        P, C = P.to(dtype), unit(len(P), 8, seed + 200).to(dtype)
        return (
            lambda h, s: PrototypeLoss(0.01)(h, P, C, a, s),
            lambda h, s: naive_term(h, P, a, s, C, 0.01),
            lambda h, s: dense.prototype_cross_entropy(h, P, a, s, C, 0.01),
            (h.to(dtype), torch.tensor(s)),
        )

    assert_within_budget(dtype, map(draw, DRAWS))


@pytest.mark.parametrize("name", [n for n in TERMS if n not in ("one dominates", "near ties")])  # those cancel: budgets above
@pytest.mark.parametrize("batch", [1, 3000])
def test_float32_terms_are_right_to_one_in_a_hundred_thousand(name, batch):
    h, P, a, s = TERMS[name](0)
    repeats = max(1, batch // len(h))
    h, a, P = h.repeat(repeats, 1)[:batch].float(), a.repeat(repeats)[:batch], P.float()
    M = soft_targets(P, P, 0.1)
    Y = dense.teacher_distribution(P, 0.1)
    for targets, kind in ((None, {}), (M, {"C": P, "temperature": 0.1})):
        value, gradients = value_and_gradients(
            lambda h, s, M=targets: prototype_cross_entropy(h, P, a, s, targets=M), h, torch.tensor(s)
        )
        want, true_gradients = value_and_gradients(
            lambda h, s, kind=kind: dense.prototype_cross_entropy(h, P, a, s, **kind), h.double(), torch.tensor(s).double()
        )
        assert_near(value, want)
        for got, true in zip(gradients, true_gradients, strict=True):
            assert_near(got, true)
    assert_near(M, Y @ P.double())


@pytest.mark.parametrize("scale", [10.0, 14.0, 18.0, 100.0])
def test_a_loss_of_a_millionth_is_off_by_a_rounding_of_one_at_most(scale):
    # One prototype dominates, and the loss is about exp(-scale). Targets that equal the prototypes must not cost digits.
    eye, a = torch.eye(8), torch.arange(8)
    calls = {
        "hard": lambda h, s: prototype_cross_entropy(h, eye, a, s),
        "soft": lambda h, s: prototype_cross_entropy(h, eye, a, s, targets=eye.clone()),
        "raw": lambda h, s: PrototypeLoss(1e-3)(h, eye, eye.clone(), a, s),
        "pairs": lambda h, s: info_nce(h, eye, s),
    }
    want, true = value_and_gradients(
        lambda h, s: dense.prototype_cross_entropy(h, eye, a, s), eye.double(), torch.tensor(scale).double()
    )
    for name, call in calls.items():
        value, gradients = value_and_gradients(call, eye, torch.tensor(scale))
        assert value >= 0, name
        assert abs(value - want) <= 1.2e-7, name
        if name != "pairs":  # there the other direction moves h too
            assert (gradients[0] - true[0]).abs().max() <= 1.2e-7 * scale, name
        assert abs(gradients[1] - true[1]) <= 1.2e-7, name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_logits_do_not_overflow(dtype, scale):
    h, P, a, _ = TERMS["logits of plus and minus 100"](0)
    h, P = h.to(dtype), P.to(dtype)
    for function, twin, inputs in (
        (
            lambda h, P: prototype_cross_entropy(h, P, a, scale),
            lambda h, P: dense.prototype_cross_entropy(h, P, a, scale),
            (h, P),
        ),
        (lambda h, P: info_nce(h, P, scale), lambda h, P: dense.info_nce(h, P, scale), (h, P.roll(1, 0))),
    ):
        value, gradients = value_and_gradients(function, *inputs)
        assert_near(value, twin(*inputs), 3e-2)
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_a_large_batch_are_float32(dtype):
    # 4096 equal rows: a float16 sum would stall long before, a bfloat16 one at 256.
    h, P = unit(1, 8, 0).to(dtype), unit(5, 8, 1).to(dtype)
    one, (h_one, s_one) = value_and_gradients(
        lambda h, s: prototype_cross_entropy(h, P, torch.tensor([3]), s), h, torch.tensor(10.0)
    )
    many, (h_many, s_many) = value_and_gradients(
        lambda h, s: prototype_cross_entropy(h, P, torch.full((4096,), 3), s), h.repeat(4096, 1), torch.tensor(10.0)
    )
    assert_near(many, one, 1e-5)
    assert_near(s_many, s_one, 1e-5)
    assert_near(h_many[0] * 4096, h_one[0], 1e-2)


def test_gradients_under_a_gradscaler_do_not_vanish_in_float16():
    # 1/B of a small residual is below float16's smallest number; the scaler's factor has to come in before the rounding.
    h, P, a, _ = TERMS["one dominates"](0)
    h, P, a = h.half().repeat(40, 1), P.half(), a.repeat(40)
    factor = 2.0**16
    for function, twin, inputs in (
        (lambda h: factor * prototype_cross_entropy(h, P, a, 20.0), lambda h: dense.prototype_cross_entropy(h, P, a, 20.0), [h]),
        (lambda h: factor * info_nce(h[:64], P[:64], 20.0), lambda h: dense.info_nce(h[:64], P[:64], 20.0), [h]),
    ):
        _, (got,) = value_and_gradients(function, *inputs)
        _, (want,) = value_and_gradients(twin, *(x.double() for x in inputs))
        assert got.dtype == torch.float16
        assert_near(got.double() / factor, want, 2e-2)


def test_more_prototypes_than_float16_can_count():
    # At scale 0 the softmax's normaliser is 70,000, and float16 ends at 65,504.
    h, P, a = unit(3, 4, 0, torch.float16), unit(70000, 4, 1, torch.float16), torch.tensor([0, 5, 69999])
    value, (h_gradient, P_gradient) = value_and_gradients(lambda h, P: prototype_cross_entropy(h, P, a, 0.01), h, P)
    want, (true, _) = value_and_gradients(lambda h, P: dense.prototype_cross_entropy(h, P, a, 0.01), h.double(), P.double())
    assert_near(value, want, 1e-5)
    assert_near(h_gradient, true, 2e-2)
    assert torch.isfinite(P_gradient).all()


# --- What comes out, and autocast


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_results_are_0d_and_at_least_float32_and_gradients_have_their_inputs_dtype(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h, P, a, _ = TERMS["plain"](0)
    h, P, C = leaf(h.to(dtype)), leaf(P.to(dtype)), unit(70, 8).to(dtype)
    results = [
        prototype_cross_entropy(h, P, a, 10.0),
        prototype_cross_entropy(h, P, a, 10.0, targets=soft_targets(C, P.detach(), 0.1)),
        PrototypeLoss()(h, P.detach(), C, a, 10.0),
        info_nce(h, P[:48], 10.0),
        InfoNCE()(h, P[:48], 10.0),
    ]
    for result in results:
        assert result.shape == ()
        assert result.dtype == wide
    sum(results).backward()
    assert (h.grad.dtype, P.grad.dtype) == (dtype, dtype)


def autocast_calls():
    h, P, a, s = TERMS["plain"](0)
    P, C = P.float(), unit(70, 8, 5, torch.float32)
    M = soft_targets(C, P, 0.1)
    prototypes = episode(teachers=("roberta",))
    index = prototypes.index[torch.arange(48) % 40]
    loss = ProtoLoss(target_temperature=0.3)
    loss.set_prototypes(prototypes)
    raw, clip = PrototypeLoss(0.1), InfoNCE()
    text, z = unit(48, 16, 7, torch.float32), unit(48, 5, 8, torch.float32)
    return {
        "hard": (h.float(), lambda h: prototype_cross_entropy(h, P, a, s)),
        "soft": (h.float(), lambda h: prototype_cross_entropy(h, P, a, s, targets=M)),
        "raw centroids": (h.float(), lambda h: raw(h, P, C, a, s)),
        "info_nce": (h.float(), lambda h: info_nce(h, text.to(h.dtype), s)),
        "InfoNCE": (h.float(), lambda h: clip(h, text.to(h.dtype), s)),
        "ProtoLoss": (z, lambda z: loss(z, z.flip(0), s, index=index)),
    }


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", autocast_calls())
def test_under_autocast_the_product_is_in_its_dtype_and_the_rest_in_float32(name, low):
    h, call = autocast_calls()[name]

    def under_autocast(h):
        with torch.autocast("cpu", dtype=low):
            return call(h)

    value, (gradient,) = value_and_gradients(under_autocast, h)
    want, (low_gradient,) = value_and_gradients(call, h.to(low))
    assert value.dtype == torch.float32
    assert value == want  # exactly what features of that dtype give, and not what float32 ones do
    assert value != call(h)
    assert gradient.dtype == torch.float32
    assert_near(gradient, low_gradient, 1e-2)


@pytest.mark.parametrize("name", autocast_calls())
def test_autocast_leaves_float64_alone(name):
    h, call = autocast_calls()[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(h.double())
    assert value == call(h.double())
    assert value.dtype == torch.float64


def test_autocast_switched_off_is_honoured():
    h, call = autocast_calls()["hard"]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert call(h) == call(h)
        assert_near(call(h), dense.prototype_cross_entropy(*TERMS["plain"](0)), 1e-5)


def test_backward_inside_autocast_gives_the_same_gradients():
    h, call = autocast_calls()["soft"]
    inside, outside = leaf(h), leaf(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(inside).backward()
        loss = call(outside)
    loss.backward()
    assert torch.equal(inside.grad, outside.grad)


@pytest.mark.parametrize("chunk_size", [1, 64])
def test_the_sum_of_many_blocks_keeps_its_digits(chunk_size):
    """Equal rows, whose rounding has one direction: 20,000 sums in float32 were off by 1e-4."""
    h, P, labels = unit(1, 8).repeat(20_000, 1), unit(4, 8, 1), torch.zeros(20_000, dtype=torch.int64)
    scale = torch.tensor(10.0)
    value, (of_scale,) = value_and_gradients(
        lambda s: prototype_cross_entropy(h.float(), P.float(), labels, s, chunk_size=chunk_size), scale
    )
    want, (true_of_scale,) = value_and_gradients(lambda s: prototype_cross_entropy(h, P, labels, s), scale.double())
    assert_near(value, want, 1e-6)
    assert_near(of_scale, true_of_scale, 5e-6)
