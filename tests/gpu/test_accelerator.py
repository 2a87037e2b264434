"""A device beside the CPU: the GPU of ``--device cuda``, or with ``--device pretended`` one that is not there.

Values are those of the CPU, no devices are mixed, states move from one to the other, and what must not wait does not: on a GPU
torch raises where it does, on the pretended device that is counted.
"""

import io
from contextlib import contextmanager

import dense
import pretend_device
import pytest
import torch
from cases import TOLERANCE, assert_near, episode, integers, term, unit, value_and_gradients
from device_cases import CASES, IMAGE, LABELS, ROWS, TEXT, K
from torch.utils._pytree import tree_map

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, OnlinePrototypes, ProtoLoss, PrototypicalBackTranslation
from protoclip_losses.functional import back_translate, info_nce, prototype_cross_entropy, relational_distillation, soft_targets

pytestmark = pytest.mark.gpu


@contextmanager
def without_waiting(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with pretend_device.waits() as waits:
            yield
        assert waits == {}


@pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_an_episode(case, device):
    """K-means, episodes, back translation, PCA, renewal of online prototypes, metrics."""
    found = [x.cpu() for x in case(device)]
    expected = case("cpu")
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


T = term(batch=64, prototypes=30, width=16, teacher_width=12, empty=(3,))
IMAGES, TEXTS, TEACHER = unit(64, 16, 5), unit(64, 16, 6), unit(64, 9, 7)
KERNELS = {
    "hard": lambda h, s, to: prototype_cross_entropy(h, to(T.P), to(T.a), s, valid=to(T.valid)),
    "soft": lambda h, s, to: prototype_cross_entropy(
        h, to(T.P), to(T.a), s, valid=to(T.valid), targets=soft_targets(to(T.C), to(T.P), 0.1, valid=to(T.valid))
    ),
    "mixture": lambda h, s, to: prototype_cross_entropy(h, to(T.P), to(torch.stack([T.a, T.a.roll(1)], 1)), s, valid=to(T.valid)),
    "rows": lambda h, s, to: prototype_cross_entropy(h, to(T.P), to(T.a), s, valid=to(T.valid), reduction="none").sum(),
    "pairs": lambda h, s, to: info_nce(h, to(TEXTS).to(h.dtype), s),
    "repeats": lambda h, s, to: info_nce(h, to(TEXTS).to(h.dtype), s, ids=to(T.a), repeats="share"),
    "distillation": lambda h, s, to: relational_distillation(h, to(TEACHER), s, 0.1),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_a_loss_and_its_gradients(kernel, dtype, device):
    """As close to float64 on the CPU as the dtype allows."""
    h = IMAGES.to(dtype)

    def to(x):
        x = x.to(device)
        return x.to(dtype) if x.is_floating_point() else x

    value, gradients = value_and_gradients(lambda h, s: kernel(h, s, to), h.to(device), T.s.float().to(device))
    truth, wanted = value_and_gradients(
        lambda h, s: kernel(h, s, lambda x: x.to(dtype).double() if x.is_floating_point() else x), h.double(), T.s
    )
    assert (value.device, gradients[0].device) == (device, device)
    for one, other in zip((value, *gradients), (truth, *wanted), strict=True):
        assert_near(one.cpu(), other, TOLERANCE[dtype])


def test_the_dense_form(device):
    """The two forms above share the library; this one is written from the equation."""
    value = prototype_cross_entropy(*(x.to(device) for x in (T.h.float(), T.P.float(), T.a)), 10.0, valid=T.valid.to(device))
    assert_near(value.cpu(), dense.prototype_cross_entropy(T.h, T.P, T.a, 10.0, valid=T.valid))


def test_a_training_step_waits_for_nothing(dtype, device):
    """Forward and backward; the first step moves the prototypes."""
    loss = ProtoLoss(target_temperature=0.3, external_target_temperature=0.1)
    loss.set_prototypes(episode(teachers=("roberta",), width=16))
    index = episode().index[:8]
    scale = torch.tensor(10.0).to(device).requires_grad_()
    inputs = [unit(8, 16, seed, dtype).to(device).requires_grad_() for seed in range(2)]
    loss(*inputs, scale, index=index).backward()
    index = index.to(device)
    with without_waiting(device):
        parts = loss(*inputs, scale, index=index, output_dict=True)
        sum(x for name, x in parts.items() if name.endswith("loss")).backward()


def test_an_online_step_waits_for_nothing(device):
    loss = ProtoLoss(target_temperature=0.3)
    loss.set_prototypes(OnlinePrototypes(8, queue_size=64, every=100, warmup=2))
    scale = torch.tensor(10.0).to(device).requires_grad_()
    inputs = [unit(16, 6, seed, torch.float32).to(device).requires_grad_() for seed in range(2)]
    for _ in range(3):
        loss(*inputs, scale).backward()
    rows = torch.arange(16).to(device)
    loss.prototypes.queue.due = lambda *_: rows  # on the CPU, their numbers come from memory that is not pinned
    with without_waiting(device):
        loss(*inputs, scale).backward()


def test_back_translation_and_soft_targets_wait_for_nothing(device):
    labels, features, counted = LABELS.to(device), IMAGE.to(device), PrototypicalBackTranslation(K)
    with without_waiting(device):
        means, counts = back_translate(labels, features, K)
        soft_targets(means, means, 0.1, valid=counts > 0)
        counted.update(labels, features)
        counted.compute()


def test_a_bank_looks_samples_up_without_waiting(device):
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    banks = [FeatureBank(torch.cat([index, index[:5]]), 6, device=where) for where in (device, "cpu")]
    features = [(IMAGE.to(x.index.device), TEXT.to(x.index.device)) for x in banks]
    if device.type == "cuda":  # torch may call the copy of memory that is not pinned a wait
        banks[0].update(index, *features[0])
    else:
        with without_waiting(device):
            banks[0].update(index, *features[0])
    banks[1].update(index, *features[1])
    for name in ("image", "text"):
        assert torch.equal(banks[0].features[name].cpu(), banks[1].features[name])
    assert banks[0].missing == 0
    with pytest.raises(IndexError, match="not in it"):
        banks[0].update(torch.tensor([ROWS]), IMAGE[:1].to(device), TEXT[:1].to(device))
    with pytest.raises(IndexError, match="not in it"):
        banks[0].update(torch.tensor([ROWS]).to(device), IMAGE[:1].to(device), TEXT[:1].to(device))


def test_wrong_values_raise_asynchronously(device):
    if device.type == "cuda":
        pytest.skip("after an assertion on a GPU a process cannot use it any more")
    good = torch.eye(3).to(device)
    wrong = {
        "label": lambda: back_translate(torch.tensor([0, 3]).to(device), good[:2], 3),
        "centroid": lambda: soft_targets(good * torch.nan, good, 0.1),
        "prototype": lambda: soft_targets(good, good / 0, 0.1),
        "mask": lambda: soft_targets(good, good, 0.1, valid=torch.zeros(3).bool().to(device)),
    }
    for call in wrong.values():
        with pytest.raises(RuntimeError, match="Expected Tensor with single nonzero value"):
            call()
    with pytest.raises(ValueError, match="teacher_centroids must be finite"):
        soft_targets(good * torch.nan, good, 0.1, check_values=True)
    soft_targets(good.where(good > 0, 0), good, 0.1, valid=torch.tensor([True, False, True]).to(device))
    invalid = torch.tensor([[1.0, 0], [torch.nan, 0]]).to(device)
    soft_targets(invalid, invalid, 0.1, valid=torch.tensor([True, False]).to(device))


def saved(state, to):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    pretended = torch.device(to).type == pretend_device.NAME  # which has no storages
    loaded = torch.load(file, map_location="cpu" if pretended else to, weights_only=True)
    return tree_map(lambda x: x.to(to) if isinstance(x, torch.Tensor) else x, loaded) if pretended else loaded


def trained_online(device):
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(OnlinePrototypes(K, queue_size=64, every=2, warmup=2))
    for part in torch.arange(96).split(24):
        loss(IMAGE[part].to(device).requires_grad_(), TEXT[part].to(device), 10.0)
    return loss


def trained_in_episodes(device):
    bank = FeatureBank.from_features(torch.arange(ROWS).to(device), IMAGE.to(device), TEXT.to(device))
    loss = ProtoLoss(target_temperature=0.1)
    loss.set_prototypes(EpisodicClusterer(K).build(bank))
    loss(IMAGE[:24].to(device), TEXT[:24].to(device), 10.0, index=torch.arange(24).to(device))
    return loss


@pytest.mark.parametrize("as_it_was", [False, True], ids=["mapped", "as_saved"])
@pytest.mark.parametrize("trained", [trained_online, trained_in_episodes])
@pytest.mark.parametrize("to_cpu", [True, False], ids=["to_cpu", "from_cpu"])
def test_a_state_of_another_device(trained, to_cpu, as_it_was, device):
    """Also where the loaded state stays on the device that it was saved on."""
    before, after = (device, torch.device("cpu")) if to_cpu else (torch.device("cpu"), device)
    first, second = trained(before), ProtoLoss(target_temperature=0.1)
    second.load_state_dict(saved(first.state_dict(), before if as_it_was else after))
    part = slice(0, 24)
    index = {} if trained is trained_online else {"index": torch.arange(24)}
    results = []
    for loss, device in ((first, before), (second, after)):
        h = IMAGE[part].to(device).requires_grad_()
        value = loss(h, TEXT[part].to(device), 10.0, **index)
        value.backward()
        results.append((value.detach().cpu(), h.grad.cpu()))
        assert h.grad.device == device
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_bank_and_a_clusterer_of_another_device(device):
    bank = FeatureBank.from_features(torch.arange(ROWS).to(device), IMAGE.to(device), TEXT.to(device))
    clusterer = EpisodicClusterer(K, warm_start=True)
    clusterer.build(bank)
    on_cpu, after = FeatureBank(torch.arange(ROWS), 6), EpisodicClusterer(K, warm_start=True)
    on_cpu.load_state_dict(saved(bank.state_dict(), "cpu"))
    after.load_state_dict(saved(clusterer.state_dict(), "cpu"))
    assert torch.equal(on_cpu.features["image"], IMAGE)
    found, expected = (c.build(b) for c, b in ((after, on_cpu), (clusterer, bank)))
    for pair, one in found.terms.items():
        torch.testing.assert_close(one.prototypes, expected.terms[pair].prototypes.cpu(), rtol=1e-4, atol=1e-5)
        assert torch.equal(one.labels, expected.terms[pair].labels.cpu())


def test_kmeans_of_many_rows_takes_few_operators(device):
    """Blocks on an accelerator are as large as its memory budget allows: the number of operators does not grow with the rows."""
    if device.type != pretend_device.NAME:
        pytest.skip("operators are counted on the pretended device")
    counted = []
    for rows in (4000, 100_000):
        x = unit(rows, 2, 0, torch.float32).to(device)
        start = unit(50, 2, 1, torch.float32).to(device)
        with pretend_device.operators() as operators:
            KMeans(50, niter=1, tol=0).fit(x, init=start)
        counted.append(operators.total())
    assert counted[1] <= 1.3 * counted[0], counted


def test_the_rules_of_a_device_that_is_pretended():
    if not pretend_device.is_possible():
        pytest.skip("this torch can pretend no device")
    pretend_device.register()
    x = IMAGE.to(pretend_device.NAME)
    assert {x.device.type, (x + 1).device.type, torch.zeros(3, device=x.device).device.type} == {pretend_device.NAME}
    assert x.cpu().device.type == x.to("cpu").device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        x + IMAGE
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()
    calls = {
        "_local_scalar_dense": lambda: float(x.sum()),
        "nonzero": lambda: x.nonzero(),
        "a mask as index": lambda: x[x > 0],
        "an index on the CPU": lambda: x[integers(ROWS, 3)],
        "a copy": lambda: x.cpu(),
        "tolist": lambda: x[0].tolist(),
    }
    for name, call in calls.items():
        with pretend_device.waits() as waits:
            call()
        assert waits == {name: 1}
    with pretend_device.waits() as waits:
        leaf = x.requires_grad_()
        (leaf.exp() @ leaf.T).logsumexp(1).sum().backward()
        integers(3, 3).to(x.device, non_blocking=True)
    assert (waits, leaf.grad.device) == ({}, x.device)
