"""Accuracies in ``metrics``: a tie is no hit, so that a collapsed encoder scores at chance."""

import pytest
import torch
from cases import episode, unit

from protoclip_losses import InfoNCE, ProtoLoss
from protoclip_losses.kernels.blocks import label_is_first

pytestmark = pytest.mark.usefixtures("form")


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_collapsed_encoder_scores_one_in_b(chunk_size):
    loss = InfoNCE(chunk_size=chunk_size)
    x = torch.ones(8, 4) / 2
    loss(x, x, 10.0)
    assert loss.metrics["contrastive_accuracy"] == 1 / 8


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_captions_that_occur_twice_score_at_most_a_half(chunk_size):
    loss = InfoNCE(chunk_size=chunk_size)
    x = unit(4, 6, dtype=torch.float32).repeat_interleave(2, 0)
    loss(x, x, 10.0)
    assert loss.metrics["contrastive_accuracy"] == 1 / 2


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_prototypes_that_are_all_equal_score_at_chance(chunk_size):
    prototypes = episode()
    for term in prototypes.terms.values():
        term.prototypes[:] = 0.25  # whose products are exact
    loss = ProtoLoss(chunk_size=chunk_size)
    loss.set_prototypes(prototypes)
    h = torch.ones(40, 5, dtype=torch.float64)
    loss(h, h, 10.0, index=prototypes.index)
    for (_, teacher), term in prototypes.terms.items():
        accuracy = loss.metrics[f"prototype_accuracy/{'text' if teacher == 'image' else 'image'}/{teacher}"]
        assert accuracy == (term.labels == 0).double().mean()


def test_where_nothing_is_tied_it_is_the_argmax():
    logits, labels = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 7
    before = logits.clone()
    assert torch.equal(label_is_first(logits, labels), logits.argmax(1) == labels)
    assert torch.equal(logits, before)


def test_a_tie_counts_for_the_lowest_column():
    logits = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [3.0, 3.0, 3.0], [-torch.inf, 0.0, 0.0]])
    assert label_is_first(logits, torch.tensor([1, 2, 0, 2])).tolist() == [True, False, True, False]
    assert label_is_first(torch.zeros(2, 1), torch.tensor([0, 0])).tolist() == [True, True]
