"""What the cases that run on several processes share."""

import pytest
import torch
import torch.distributed as dist

SHARES = [5, 1, 7, 3]  # rows of each rank: unequal, one of them alone
LOCAL = {"process_group": False}


def own_rows(rank, shares=SHARES):
    """This rank's part of the rows of all ranks."""
    start = sum(shares[:rank])
    return slice(start, start + shares[rank])


def everyone(x):
    """The tensors of all ranks, of equal shape."""
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.detach().contiguous())
    return torch.stack(out)


def assert_same_on_every_rank(*tensors):
    for x in tensors:
        gathered = everyone(x)
        assert all(torch.equal(gathered[0], other) for other in gathered[1:])


def raises_everywhere(call, bad_rank, error, message):
    """The bad rank sees its own error, the others a ValueError that names it."""
    if dist.get_rank() == bad_rank:
        with pytest.raises(error, match=message):
            call()
    else:
        with pytest.raises(ValueError, match=rf"bad input on rank\(s\) \[{bad_rank}\]"):
            call()
