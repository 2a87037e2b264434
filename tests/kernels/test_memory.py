"""What a call costs: memory that does not grow with B x K or B x B, and no product more than it needs."""

import pytest
import torch
from cases import integers, unit
from cost import cost

from protoclip_losses import InfoNCE, PrototypeLoss
from protoclip_losses.functional import back_translate, info_nce, prototype_cross_entropy, soft_targets

pytestmark = pytest.mark.cpu_only

MEGABYTE = 2**20
SMALL = 1.05  # products with a vector come on top


def inputs(batch, prototypes, width, dtype=torch.float32):
    return unit(batch, width, 0, dtype), unit(prototypes, width, 1, dtype), integers(prototypes, batch)


@pytest.mark.parametrize("soft", [False, True])
def test_a_term_never_holds_batch_times_prototypes(soft):
    h, P, a = inputs(16384, 4096, 4)  # 256 MB
    M = soft_targets(P, P, 0.1) if soft else None
    h.requires_grad_()
    peak, _ = cost(lambda: prototype_cross_entropy(h, P, a, 10.0, targets=M).backward())
    assert peak <= 64 * MEGABYTE


def test_a_term_with_learned_prototypes_never_holds_batch_times_prototypes():
    h, P, a = inputs(16384, 4096, 4)
    peak, _ = cost(lambda: prototype_cross_entropy(h.requires_grad_(), P.requires_grad_(), a, 10.0).backward())
    assert peak <= 64 * MEGABYTE


def test_evaluation_does_not_hold_batch_times_prototypes_either():
    h, P, a = inputs(16384, 4096, 4)
    peak, _ = cost(lambda: prototype_cross_entropy(h, P, a, 10.0))
    assert peak <= 64 * MEGABYTE


def test_infonce_beyond_its_budget_is_linear_in_the_batch():
    z = unit(11600, 2, 0, torch.float32), unit(11600, 2, 1, torch.float32)  # 513 MiB of logits
    z[0].requires_grad_()
    peak, _ = cost(lambda: info_nce(*z, 10.0).backward())
    assert peak <= 150 * MEGABYTE


def test_infonce_without_gradients_keeps_no_logits():
    z = unit(6000, 2, 0, torch.float32), unit(6000, 2, 1, torch.float32)  # 137 MiB of logits
    peak, _ = cost(lambda: InfoNCE()(*z, 10.0))
    assert peak <= 64 * MEGABYTE


@pytest.mark.parametrize("chunk_size", [1, 16])
def test_chunk_size_bounds_the_block(chunk_size):
    h, P, a = inputs(64, 20000, 4)
    block = chunk_size * 20000 * 4
    prototype_cross_entropy(h, P, a, 10.0)
    peak, _ = cost(lambda: prototype_cross_entropy(h, P, a, 10.0, chunk_size=chunk_size))
    assert peak <= 3 * block + 2 * 20000 * 4 * 4


def test_soft_targets_never_hold_prototypes_times_prototypes():
    _, P, _ = inputs(1, 8192, 4)  # 256 MB
    peak, _ = cost(lambda: soft_targets(P, P, 0.1))
    assert peak <= 128 * MEGABYTE


def test_raw_centroids_never_hold_prototypes_times_prototypes():
    h, P, a = inputs(64, 8192, 4)
    peak, _ = cost(lambda: PrototypeLoss(0.1)(h, P, P.clone(), a, 10.0))
    assert peak <= 32 * MEGABYTE


def test_back_translation_never_holds_samples_times_prototypes():
    features, _, labels = inputs(20000, 4000, 4)  # 320 MB
    peak, _ = cost(lambda: back_translate(labels, features, 4000))
    assert peak <= 8 * MEGABYTE


@pytest.mark.parametrize(
    ("asking", "allowed"),
    [
        ((), 1),
        (("features",), 2),
        (("scale",), 2),
        (("features", "scale"), 2),
        (("prototypes",), 2),
        (("features", "prototypes"), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("soft", [False, True])
def test_forward_and_backward_take_one_product_for_the_loss_and_one_for_each_large_gradient(soft, asking, allowed):
    h, P, a = inputs(3000, 2500, 32)
    M, s = (unit(2500, 32, 2, torch.float32) if soft else None), torch.tensor(10.0)
    for name, x in (("features", h), ("prototypes", P), ("scale", s)):
        x.requires_grad_(name in asking)

    def run():
        loss = prototype_cross_entropy(h, P, a, s, targets=M)
        if asking:
            loss.backward()

    _, products = cost(run)
    assert products <= SMALL * allowed * 3000 * 2500 * 32


def test_no_gradient_is_formed_where_none_can_be_asked_for():
    h, P, a = inputs(3000, 2500, 64)
    h.requires_grad_()
    P.requires_grad_()
    with torch.no_grad():
        _, products = cost(lambda: prototype_cross_entropy(h, P, a, 10.0))
        _, pairs = cost(lambda: info_nce(h, h.flip(0), 10.0))
    assert products <= SMALL * 3000 * 2500 * 64
    assert pairs <= SMALL * 3000 * 3000 * 64


@pytest.mark.parametrize(("batch", "allowed"), [(3000, 3), (11600, 4)])
def test_infonce_takes_three_products_within_its_budget_and_four_beyond(batch, allowed):
    z = unit(batch, 64, 0, torch.float32), unit(batch, 64, 1, torch.float32)
    z[0].requires_grad_()
    _, products = cost(lambda: info_nce(*z, 10.0).backward())
    assert products <= SMALL * allowed * batch * batch * 64
