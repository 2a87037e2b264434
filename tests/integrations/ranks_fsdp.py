"""FSDP2 on gloo: sharded parameters, each with its part of the gradient of one process."""

import pytest
import torch
from cases import assert_near
from host_own_loop import Clip
from host_pairs import PicturePairs
from rank_cases import rank_case
from ranks import own_rows
from torch.distributed.device_mesh import init_device_mesh

from protoclip_losses import EpisodicClusterer, FeatureBank, ProjectionHead, ProtoLoss

SHARES = [5, 9]
if torch.__version__ < "2.6":
    pytest.skip("FSDP2 has its public name since torch 2.6", allow_module_level=True)


def new_model():
    torch.manual_seed(0)
    model = Clip()
    for tower in ("image", "text"):
        setattr(model.proto, tower, ProjectionHead(64, 32, 64, norm="layer"))
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))  # FSDP2 shards no scalar
    return model


def step(model, index, images, texts, **options):
    """Extraction, clustering and one backward on these rows."""
    with torch.no_grad():
        out = model(images, texts)
    bank = FeatureBank(index, 32)
    bank.update(index, out["image_features_projected"], out["text_features_projected"])
    loss = ProtoLoss(**options)
    loss.set_prototypes(EpisodicClusterer(3, **options).build(bank))
    loss(**model(images, texts), index=index).backward()


@rank_case(world_sizes=(2,))
def sharded_gradients_are_those_of_one_process(rank, world_size, folder):
    from torch.distributed.fsdp import fully_shard

    pairs = PicturePairs(sum(SHARES))
    batch = torch.arange(len(pairs)), pairs.pixel_values, pairs.input_ids
    whole, model = new_model(), new_model()
    step(whole, *batch, process_group=False)
    mesh = init_device_mesh("cpu", (world_size,))
    for part in (model.image, model.text, model.proto, model):
        fully_shard(part, mesh=mesh)
    step(model, *(x[own_rows(rank, SHARES)] for x in batch))
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    for name, p in model.named_parameters():
        assert_near(p.grad.full_tensor(), wanted[name], 1e-4)
