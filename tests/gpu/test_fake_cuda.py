"""What can be known of a GPU without one: no device is mixed, nothing is read back, and how many operators a step launches.

Only a CUDA build of torch can pretend; the hosts' environment has one, and CI fails if these tests are skipped there.
"""

from dataclasses import replace

import fake_cuda as fake
import pytest
import torch
from cases import episode, unit

from protoclip_losses import InfoNCE, OnlinePrototypes, ProtoLoss, PrototypeLoss, RelationalDistillation, SigmoidPairLoss
from protoclip_losses.functional import info_nce, prototype_cross_entropy, relational_distillation, sigmoid_pair_loss
from protoclip_losses.kernels import sizes
from protoclip_losses.prototypes import BatchFeatures

pytestmark = pytest.mark.skipif(not fake.CAN_PRETEND, reason="needs a CUDA build of torch 2.10 or later")

B, K, D, L = 512, 300, 64, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    with fake.pretended():
        yield


@pytest.fixture(params=["kernel", "dense"])
def form(request, monkeypatch):
    """Terms of few logits by their kernel, as those of many, and by the dense expression."""
    if request.param == "kernel":
        monkeypatch.setitem(sizes.SIZES, "accelerator", replace(sizes.SIZES["accelerator"], dense_logits=0))


def scale():
    return torch.empty((), device=fake.DEVICE).requires_grad_()


def h(dtype):
    return fake.rows(B, D, dtype)


def prototypes(dtype=torch.float32, rows=K):
    return fake.rows(rows, D, dtype, leaf=False)


def mask(size):
    return torch.empty(size, device=fake.DEVICE, dtype=torch.bool)


# name: (the most operators, checks and gradients included; the call)
TERMS = {
    "hard": (60, lambda t: prototype_cross_entropy(h(t), prototypes(t), fake.labels(B), scale())),
    "hard, valid": (60, lambda t: prototype_cross_entropy(h(t), prototypes(t), fake.labels(B), scale(), valid=mask(K))),
    "soft": (60, lambda t: prototype_cross_entropy(h(t), prototypes(t), fake.labels(B), scale(), targets=prototypes())),
    "soft, valid": (
        *(60, lambda t: prototype_cross_entropy(h(t), prototypes(t), fake.labels(B), 9.0, targets=prototypes(), valid=mask(K))),
    ),
    "mixture": (70, lambda t: prototype_cross_entropy(h(t), prototypes(t), fake.labels(B, L), scale(), targets=prototypes())),
    "weighted mixture": (
        80,
        lambda t: prototype_cross_entropy(
            h(t), prototypes(t), fake.labels(B, L), scale(), label_weights=fake.rows(B, L, leaf=False), valid=mask(K)
        ),
    ),
    "rows": (60, lambda t: prototype_cross_entropy(h(t), prototypes(t), fake.labels(B), scale(), reduction="none")),
    "learned": (60, lambda t: prototype_cross_entropy(h(t), fake.rows(K, D, t), fake.labels(B), scale())),
    "PrototypeLoss": (100, lambda t: PrototypeLoss(0.1)(h(t), prototypes(t), prototypes(), fake.labels(B), scale())),
    "PrototypeLoss, hard": (60, lambda t: PrototypeLoss(None)(h(t), prototypes(t), prototypes(), fake.labels(B), scale())),
}
PAIRS = {
    "info_nce": (60, lambda t: info_nce(h(t), h(t), scale())),
    "evaluation": (40, lambda t: info_nce(h(t).detach(), h(t).detach(), 9.0)),
    "masked repeats": (65, lambda t: info_nce(h(t), h(t), scale(), ids=fake.labels(B), repeats="mask")),
    "shared repeats": (90, lambda t: info_nce(h(t), h(t), scale(), ids=fake.labels(B), repeats="share")),
    "rows": (60, lambda t: info_nce(h(t), h(t), scale(), reduction="none")),
    "InfoNCE": (65, lambda t: InfoNCE()(h(t), h(t), scale(), output_dict=True)),
    "sigmoid": (60, lambda t: sigmoid_pair_loss(h(t), h(t), scale(), scale(), chunk_size=B)),
    "sigmoid, dense": (60, lambda t: sigmoid_pair_loss(h(t), h(t), scale(), scale())),
    "sigmoid, evaluation": (40, lambda t: sigmoid_pair_loss(h(t).detach(), h(t).detach(), 9.0, -9.0, chunk_size=B)),
    "sigmoid rows": (60, lambda t: sigmoid_pair_loss(h(t), h(t), scale(), scale(), reduction="none")),
    "SigmoidPairLoss": (65, lambda t: SigmoidPairLoss(chunk_size=B)(h(t), h(t), scale(), scale(), output_dict=True)),
    "relational_distillation": (70, lambda t: relational_distillation(h(t), fake.rows(B, 9, leaf=False), scale(), 0.1)),
    "distilled rows": (70, lambda t: relational_distillation(h(t), fake.rows(B, 9, leaf=False), scale(), 0.1, reduction="none")),
    "RelationalDistillation": (70, lambda t: RelationalDistillation()(h(t), fake.rows(B, 9, leaf=False), scale())),
}


def assert_cheap(call, most, counts_rows=False):
    seen = fake.operators(call)
    assert counts_rows or seen.made_on_cpu == {}
    assert seen.total <= most, f"{seen.total} operators: {dict(seen.counts.most_common())}"


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_a_term(name, dtype):
    most, call = TERMS[name]
    assert_cheap(lambda: call(dtype), most)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, dtype):
    most, call = PAIRS[name]
    assert_cheap(lambda: call(dtype), most)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", [*TERMS, *PAIRS])
def test_under_autocast(name):
    most, call = (TERMS | PAIRS)[name]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_cheap(lambda: call(torch.float32), most + 15)


def built(**settings):
    """A loss with two internal and two external terms."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        loss = ProtoLoss(target_temperature=0.3, **settings)
        loss.set_prototypes(episode(teachers=("roberta",), width=D))
    return loss


def step(loss, dtype, index=None, **settings):
    features = [h(dtype) for _ in range(4)]
    projected = dict(zip(("image_features_projected", "text_features_projected"), features[2:], strict=True))
    index = fake.labels(B) if index is None else index
    return loss(*features[:2], scale(), **projected, logit_scale_proto=scale(), index=index, output_dict=True, **settings)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step(dtype):
    """The first also moves the prototypes to their device; none of the following reads back whether an accuracy is at chance."""
    loss = built()
    assert_cheap(lambda: step(loss, dtype), 350 + 40)
    for _ in range(3):
        assert_cheap(lambda: step(loss, dtype), 350)


def test_a_step_with_all_there_is():
    loss = built(repeats="share", w_distill=1.0, external_target_temperature=0.1)
    call = {"ids": fake.labels(B), "teacher_features": {"roberta": fake.rows(B, 9, leaf=False)}}
    for _ in range(2):
        assert_cheap(lambda: step(loss, torch.bfloat16, **call), 600)


def test_an_index_on_the_cpu_is_copied_without_waiting():
    loss = built()
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        index = torch.arange(B)
    step(loss, torch.float32, index)
    with Copies() as copies:
        step(loss, torch.float32, index)
    assert copies.blocking == []


class Copies(fake.Operators):
    """Copies from the CPU that are waited for."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy" and args[0].device.type == "cpu" and not kwargs.get("non_blocking"):
            self.blocking.append(args[0].shape)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_few_blocks_where_logits_do_not_fit():
    """In 7,136 operators once, by the blocks of a CPU."""
    x = [fake.rows(32768, 512, torch.bfloat16) for _ in range(2)]
    assert_cheap(lambda: info_nce(*x, scale()), 700)
    assert_cheap(lambda: sigmoid_pair_loss(*x, scale(), scale()), 300)
    assert_cheap(
        lambda: prototype_cross_entropy(fake.rows(65536, D, torch.bfloat16), prototypes(rows=512), fake.labels(65536), 9.0), 60
    )


def test_a_mixed_device_and_a_value_read_back_are_seen():
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        h(torch.float32) + torch.ones(B, D)
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        bool(fake.labels(1) > 0)
    with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
        fake.labels(B).nonzero()
    assert fake.operators(lambda: torch.ones(2, device="cpu")).made_on_cpu == {"ones": 1}
    assert fake.operators(lambda: h(torch.float32).detach()[0].exp()).total == 1


def online(every):
    """A loss whose prototypes are those of features that follow training, after warm-up."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        loss = ProtoLoss(target_temperature=0.3)
        loss.set_prototypes(OnlinePrototypes(K, queue_size=2 * B, every=every, warmup=2))
        for seed in range(3):
            x = [unit(B, D, seed + i, torch.float32).requires_grad_() for i in range(2)]
            loss(*x, 10.0, teacher_features={"t": unit(B, 9, seed, torch.float32)})
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_online_steps(dtype, monkeypatch):
    """560 to 980 operators and 50 to 105 values that were read back, once."""
    loss = online(every=100)
    # Which rows are due is arithmetic on the CPU, whose numbers this mode does not compute.
    monkeypatch.setattr(loss.prototypes.queue, "due", lambda *_: torch.arange(30, device="cpu"))
    teacher = {"t": fake.rows(B, 9, leaf=False)}

    def step():
        loss(h(dtype), h(dtype), scale(), teacher_features=teacher, output_dict=True)

    assert_cheap(step, 660, counts_rows=True)  # the first moves queue and prototypes, and computes targets
    for _ in range(3):
        assert_cheap(step, 600, counts_rows=True)
    assert loss.prototypes.step == 7


def test_labels_of_online_prototypes():
    prototypes = online(every=100).prototypes
    batch = BatchFeatures({"image": h(torch.float32), "text": h(torch.float32)}, {"t": fake.rows(B, 9, leaf=False)})
    assert {x.shape for x in prototypes.labels(batch).values()} == {(B,)}
