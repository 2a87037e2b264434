"""What the integrations share, where no host is needed."""

import pytest
import torch
from cases import unit

from protoclip_losses import EpisodeSampler
from protoclip_losses._checks import require
from protoclip_losses.episodes import EpisodeOrder, WithIndex
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
