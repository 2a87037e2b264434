"""open_clip's own loop on a DDP model: extraction, clustering and a step over two processes."""

import torch
import torch.distributed as dist
from cases import assert_near
from integrations.open_clip_step import add_tiny_model, one_step, triples
from ranks import own_rows
from torch.nn.parallel import DistributedDataParallel

SHARES = [7, 9]


def a_step_of_two_processes_is_that_of_one(rank, world_size, folder):
    configs = folder / f"configs.{rank}"
    configs.mkdir()
    add_tiny_model(configs)
    data = triples(sum(SHARES))
    rows = own_rows(rank, SHARES)
    own = torch.utils.data.Subset(data, range(rows.start, rows.stop))
    model = one_step(folder, own, wrap=DistributedDataParallel)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    dist.barrier()
    dist.destroy_process_group()
    whole = one_step(folder, data)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    for name, p in whole.named_parameters():
        assert_near(gradients[name], p.grad, 1e-5)


CASES = [a_step_of_two_processes_is_that_of_one]
