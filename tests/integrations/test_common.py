"""What the integrations share, where no host is needed."""

from collections import UserDict, namedtuple

import pytest
import torch
from cases import unit
from torch.utils.data import DataLoader

from protoclip_losses import EpisodeSampler
from protoclip_losses._checks import require
from protoclip_losses.episodes import EpisodeOrder, WithIndex, extract
from protoclip_losses.heads import ProjectionHeads


def test_a_host_that_is_not_installed_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"needs no_such_host, .* pip install 'protoclip-losses\[lightning\]'"):
        require("no_such_host", "lightning")


def test_an_index_in_mappings_tuples_and_lists():
    assert [WithIndex(data)[1] for data in ([{"a": 1}, {"a": 2}], [(1, 2), (3, 4)], [[1], [3]])] == [
        {"a": 2, "index": 1},
        (3, 4, 1),
        (3, 1),
    ]
    assert len(WithIndex("abc")) == 3


def test_items_of_any_kind_carry_an_index():
    x = torch.ones(2)
    assert WithIndex([0, 5.0])[1] == (5.0, 1)
    assert WithIndex(["a", "b"])[1] == ("b", 1)
    assert WithIndex([x])[0] == (x, 0)
    assert WithIndex([UserDict(a=1)])[0] == {"a": 1, "index": 0}
    assert WithIndex([Pair("cat.jpg", "a cat")])[0] == ("cat.jpg", "a cat", 0)
    assert WithIndex([None, (1, 2)])[0] is None  # a broken sample, for a collate_fn that leaves it out


Pair = namedtuple("Pair", "image text")


def test_broken_samples_can_be_left_out_by_the_loader():
    def collate(items):
        return torch.utils.data.default_collate([item for item in items if item is not None])

    data = WithIndex([(0.5, "a"), None, (1.5, "c"), None])
    ((values, texts, index),) = DataLoader(data, batch_size=4, collate_fn=collate)
    assert (values.tolist(), list(texts), index.tolist()) == ([0.5, 1.5], ["a", "c"], [0, 2])


def test_data_and_order_print_what_they_are():
    order = EpisodeOrder(EpisodeSampler(20, 11), 1, 3)
    order.set_epoch(4)
    sampler = "EpisodeSampler(dataset_size=20, episode_size=11, seed=0, episodes=None, number=0)"
    assert repr(order) == f"EpisodeOrder({sampler}, rank=1, world_size=3, epoch=4)"
    assert repr(WithIndex([1, 2])) == "WithIndex(list of 2 samples)"
    with pytest.raises(ValueError, match=r"rank must lie in \[0, world_size=3\), got 3"):
        EpisodeOrder(EpisodeSampler(20, 11), 3, 3)


def test_nothing_to_extract_is_an_error():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        extract(model, [], lambda batch: batch)
    assert model.training


def test_ranks_share_the_episode_of_an_epoch():
    orders = [EpisodeOrder(EpisodeSampler(20, 11), rank, 3) for rank in range(3)]
    for epoch in (0, 2):
        for order in orders:
            order.set_epoch(epoch)
        shards = [list(order) for order in orders]
        assert [len(shard) for shard in shards] == [len(order) for order in orders] == [4, 4, 3]
        assert sorted(i for shard in shards for i in shard) == EpisodeSampler(20, 11).episode(epoch).index.sort().values.tolist()


def test_heads_start_equal_and_return_rows_of_length_one_in_their_own_dtype():
    heads = ProjectionHeads(6, 4, 8)
    z = unit(5, 6, dtype=torch.bfloat16) * 3
    out = heads.eval()(z, z)
    assert torch.equal(out["image_features_projected"], out["text_features_projected"])
    assert out["image_features_projected"].dtype == torch.float32
    torch.testing.assert_close(out["text_features_projected"].norm(dim=1), torch.ones(5))
    assert float(out["logit_scale_proto"].detach()) == pytest.approx(1 / 0.07)
    for log_scale, kept in ((-1.0, 1.0), (9.0, 100.0)):
        heads.logit_scale_proto.data.fill_(log_scale)
        heads.clamp_scale()
        assert float(heads.logit_scale_proto.detach().exp()) == pytest.approx(kept)
