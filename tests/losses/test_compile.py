"""torch.compile over the losses: one graph, and eager's values and gradients."""

import shutil

import pytest
import torch
from cases import assert_near, episode, integers, leaf, unit
from torch.profiler import ProfilerActivity, profile

from protoclip_losses import InfoNCE, ProtoLoss, PrototypeLoss, SigmoidPairLoss
from protoclip_losses.functional import info_nce, prototype_cross_entropy, sigmoid_pair_loss, soft_targets
from protoclip_losses.losses import soft_target_cache

H, TEXT = unit(11, 5, 0, torch.float32), unit(11, 5, 1, torch.float32)
P, C, A = unit(7, 5, 2, torch.float32), unit(7, 4, 3, torch.float32), integers(7, 11)
VALID = torch.arange(7) != 6
M = soft_targets(C, P, 0.3, valid=VALID)
LABELS = integers(6, 11).index_fill(0, torch.tensor([2]), -1)
EPISODE = episode(teachers=("roberta",), empty=(1,))
INDEX = EPISODE.index[:11]


def proto_loss(prototypes=EPISODE, **settings):
    loss = ProtoLoss(target_temperature=0.3, **settings)
    loss.set_prototypes(prototypes)
    return loss


# name: a function that makes a function of (features, scale); modules are made outside what is compiled
CALLS = {
    "info_nce": lambda: lambda h, s: info_nce(h, TEXT, s),
    "sigmoid": lambda: lambda h, s: sigmoid_pair_loss(h, TEXT, s, s - 13, chunk_size=4),
    "sigmoid, dense": lambda: lambda h, s: sigmoid_pair_loss(h, TEXT, s, -3.0),
    "sigmoid rows": lambda: lambda h, s: sigmoid_pair_loss(h, TEXT, s, s - 13, reduction="none").square().sum(),
    "hard term": lambda: lambda h, s: prototype_cross_entropy(h, P, A, s),
    "soft term, mask, ignored row": lambda: lambda h, s: prototype_cross_entropy(h, P, LABELS, s, targets=M, valid=VALID),
    "learned prototypes": lambda: lambda h, s: prototype_cross_entropy(H, h[:7], A, s, targets=h[:7] * 2),
    "InfoNCE": lambda: (lambda loss: lambda h, s: loss(h, TEXT, s, logit_bias=s))(InfoNCE()),
    "SigmoidPairLoss": lambda: (lambda loss: lambda h, s: loss(h, TEXT, s, s - 13))(SigmoidPairLoss(memory_budget=300)),
    "PrototypeLoss": lambda: (lambda loss: lambda h, s: loss(h, P, C, A, s))(PrototypeLoss(0.3)),
    "PrototypeLoss, hard": lambda: (lambda loss: lambda h, s: loss(h, P, C, A, s))(PrototypeLoss(None)),
    "ProtoLoss": lambda: (lambda loss: lambda h, s: loss(h, TEXT, s, index=INDEX))(proto_loss()),
    "ProtoLoss, parts": lambda: (lambda loss: lambda h, s: sum(loss(h, TEXT, s, index=INDEX, output_dict=True).values()))(
        proto_loss(w_clip=0.5)
    ),
    "ProtoLoss, sigmoid": lambda: (lambda loss: lambda h, s: loss(h, TEXT, s, s - 13, index=INDEX))(
        proto_loss(pair_loss="sigmoid", chunk_size=4)
    ),
    "ProtoLoss, absent terms": lambda: (lambda loss: lambda h, s: loss(h, TEXT, 2.0, s, features={"audio": h}))(proto_loss(None)),
}


def run(function, h=H, s=10.0):
    h, s = leaf(h), leaf(torch.tensor(s))
    value = function(h, s)
    value.backward()
    return value.detach(), h.grad, s.grad


def assert_compiles(make, backend):
    torch._dynamo.reset()
    eager, compiled = run(make()), run(torch.compile(make(), fullgraph=True, backend=backend))
    for got, want in zip(compiled, eager, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_near(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_with_eagers_values_and_gradients(name):
    assert_compiles(CALLS[name], "aot_eager")


def test_a_training_step_of_all_losses_in_one_graph():
    assert_compiles(lambda: everything(), "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    assert_compiles(lambda: everything(), "inductor")


def everything():
    functions = [CALLS[name]() for name in ("info_nce", "sigmoid", "hard term", "InfoNCE", "PrototypeLoss", "ProtoLoss")]
    return lambda h, s: sum(function(h, s) for function in functions)


def test_a_second_batch_is_right_too():
    torch._dynamo.reset()
    loss = proto_loss()

    def step(h, s, index):
        return loss(h, TEXT, s, index=index)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for start in (0, 5, 20):
        index = EPISODE.index[start : start + 11]
        got = run(lambda h, s, index=index: compiled(h, s, index), H.roll(start, 0))
        want = run(lambda h, s, index=index: step(h, s, index), H.roll(start, 0))
        for a, b in zip(got, want, strict=True):
            assert_near(a, b)


def test_new_prototypes_are_seen_by_what_was_compiled():
    torch._dynamo.reset()
    loss = proto_loss()
    compiled = torch.compile(lambda h, s, index: loss(h, TEXT, s, index=index), fullgraph=True, backend="aot_eager")
    for prototypes in (EPISODE, episode(teachers=("roberta",), seed=9), episode(teachers=("roberta",), prototypes=8, seed=10)):
        loss.set_prototypes(prototypes)
        index = prototypes.index[:11]
        assert_near(compiled(H, 10.0, index), loss(H, TEXT, 10.0, index=index))


def test_under_autocast():
    def step(h, s):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return info_nce(h, TEXT, s) + prototype_cross_entropy(h, P, A, s)

    torch._dynamo.reset()
    for got, want in zip(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True):
        assert_near(got, want, 1e-3)


def test_without_gradients():
    torch._dynamo.reset()
    step = lambda h: info_nce(h, TEXT, 10.0) + prototype_cross_entropy(h, P, A, 10.0)  # noqa: E731
    with torch.no_grad():
        assert_near(torch.compile(step, fullgraph=True, backend="aot_eager")(H), step(H))


def test_shape_errors_are_still_raised():
    torch._dynamo.reset()
    compiled = torch.compile(lambda h: info_nce(h, TEXT, 10.0), backend="aot_eager")
    with pytest.raises(ValueError, match="text_features must have 5 rows"):
        compiled(H[:5])


def flops(call):
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as p:
        call()
    return sum(event.flops for event in p.key_averages())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_targets_are_kept_and_never_stale(backend):
    """They were computed in each step once: PrototypeLoss took 1.9 times as long compiled."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    eager = PrototypeLoss(0.3)
    compiled = torch.compile(PrototypeLoss(0.3), fullgraph=True, backend=backend)
    prototypes, centroids = unit(300, 5, 2, torch.float32), unit(300, 40, 3, torch.float32)
    valid = torch.arange(300) != 6
    call = lambda: compiled(H, prototypes, centroids, A, 10.0, valid=valid)  # noqa: E731
    call()
    again, product = flops(call), 2 * 11 * 300 * 5
    assert again < 1.1 * product < flops(lambda: PrototypeLoss(0.3)(H, prototypes, centroids, A, 10.0, valid=valid))
    for change in (lambda: prototypes.mul_(-1.3), lambda: centroids.mul_(0.5), lambda: valid[int(A[0])].fill_(False)):
        change()
        assert_near(call(), eager(H, prototypes, centroids, A, 10.0, valid=valid))
    for other in (centroids + 0.1, centroids):
        assert_near(compiled(H, prototypes, other, A, 10.0), eager(H, prototypes, other, A, 10.0))
    warmer = torch.compile(PrototypeLoss(2.0), fullgraph=True, backend=backend)
    assert_near(warmer(H, prototypes, centroids, A, 10.0), PrototypeLoss(2.0)(H, prototypes, centroids, A, 10.0))


def test_compiled_targets_of_prototypes_that_the_graph_makes():
    torch._dynamo.reset()
    loss = PrototypeLoss(0.3)
    step = lambda h, factor: loss(h, P * factor, C, A, 10.0)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 0.5, 2.0):
        factor = torch.tensor(factor)
        assert_near(compiled(H, factor), step(H, factor))


def test_kept_targets_go_with_their_prototypes():
    torch._dynamo.reset()
    compiled = torch.compile(PrototypeLoss(0.3), fullgraph=True, backend="aot_eager")
    before = len(soft_target_cache._kept_of_graphs)
    prototypes = P.clone()
    compiled(H, prototypes, C, A, 10.0)
    assert len(soft_target_cache._kept_of_graphs) == before + 1
    del prototypes
    assert len(soft_target_cache._kept_of_graphs) == before
