"""Values that select, where none is read to check it (an accelerator, a graph), are asserted on the device."""

import pytest
import torch
from cases import episode, integers, set_sizes, unit

from protoclip_losses import ProtoLoss, PrototypeLoss, PrototypicalBackTranslation
from protoclip_losses.clustering.points import segment_sums_and_counts
from protoclip_losses.functional import back_translate, prototype_cross_entropy

pytestmark = pytest.mark.cpu_only

H, P, A = unit(11, 5, 0), unit(7, 5, 1), integers(7, 11)
SEVERAL = torch.stack([A, A.roll(1)], 1)
VALID = torch.arange(7) != 6


def unlike(labels, value):
    labels = labels.clone()
    labels[4] = value
    return labels


def proto_loss(index):
    prototypes = episode()
    loss = ProtoLoss(check_values=False)
    loss.set_prototypes(prototypes)
    return loss(H, H, 10.0, index=prototypes.index[:11] + index)


CALLS = {
    "too large": lambda **k: prototype_cross_entropy(H, P, unlike(A, 7), 10.0, **k),
    "-2": lambda **k: prototype_cross_entropy(H, P, unlike(A, -2), 10.0, targets=P, **k),
    "rows": lambda **k: prototype_cross_entropy(H, P, unlike(A, -2), 10.0, reduction="none", **k),
    "of several": lambda **k: prototype_cross_entropy(H, P, unlike(SEVERAL, -2), 10.0, **k),
    "invalid": lambda **k: prototype_cross_entropy(H, P, unlike(A, 6), 10.0, valid=VALID, **k),
    "weight below 0": lambda **k: prototype_cross_entropy(H, P, SEVERAL, 10.0, label_weights=unlike(torch.ones(11, 2), -1), **k),
    "weight NaN": lambda **k: prototype_cross_entropy(
        H, P, SEVERAL, 10.0, label_weights=unlike(torch.ones(11, 2), torch.nan), **k
    ),
    "weight Inf": lambda **k: prototype_cross_entropy(
        H, P, SEVERAL, 10.0, label_weights=unlike(torch.ones(11, 2), torch.inf), **k
    ),
    "PrototypeLoss": lambda **k: PrototypeLoss(0.3, **k)(H, P, P, unlike(A, -2), 10.0),
    "PrototypeLoss, hard": lambda **k: PrototypeLoss(None, **k)(H, P, P, unlike(A, 6), 10.0, valid=VALID),
    "back_translate": lambda **k: back_translate(unlike(A, 7), H, 7, **k),
    "back_translate, -2": lambda **k: back_translate(unlike(A, -2), H, 7, **k),
}


@pytest.mark.parametrize("size", [0, 2**62], ids=["streamed", "dense"])
@pytest.mark.parametrize("name", CALLS)
def test_a_value_that_selects_nothing(name, size, monkeypatch):
    set_sizes(monkeypatch, dense_logits=size)
    with pytest.raises(RuntimeError):
        CALLS[name](check_values=False)
    with pytest.raises(ValueError, match=r"labels|label_weights"):
        CALLS[name](check_values=True)


def test_indices_of_an_episode_and_labels_of_sums():
    proto_loss(0)
    with pytest.raises(RuntimeError):
        proto_loss(1000)
    for label in (7, -2):
        with pytest.raises((RuntimeError, ValueError)):
            PrototypicalBackTranslation(7).update(unlike(A, label), H)
    with pytest.raises(RuntimeError):
        segment_sums_and_counts(unlike(A, 7), H, 7)
