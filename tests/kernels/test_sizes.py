"""How large blocks are: by device, by ``chunk_size``, by ``memory_budget``; one answer whichever it is."""

import pytest
import torch
from cases import assert_near, integers, leaf, unit
from cost import cost

from protoclip_losses import InfoNCE, ProtoLoss, PrototypeLoss, RelationalDistillation
from protoclip_losses.functional import info_nce, prototype_cross_entropy, relational_distillation
from protoclip_losses.kernels.sizes import SIZES, BlockLimit, can_be_dense, can_be_kept, rows_per_block

MIB = 2**20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H, TEXT, P, A = unit(900, 5, 0), unit(900, 5, 1), unit(700, 5, 2), integers(700, 900)
CALLS = {
    "info_nce": lambda h, **k: info_nce(h, TEXT.to(h.dtype), 9.0, **k),
    "info_nce, rows": lambda h, **k: info_nce(h, TEXT.to(h.dtype), 9.0, reduction="none", **k).sum(),
    "term": lambda h, **k: prototype_cross_entropy(h, P.to(h.dtype), A, 9.0, **k),
    "term, rows": lambda h, **k: prototype_cross_entropy(h, P.to(h.dtype), A, 9.0, reduction="none", **k).sum(),
    "distillation": lambda h, **k: relational_distillation(h, TEXT.to(h.dtype), 9.0, 0.1, **k),
    "InfoNCE": lambda h, **k: InfoNCE(**k)(h, TEXT.to(h.dtype), 9.0),
    "PrototypeLoss": lambda h, **k: PrototypeLoss(0.1, **k)(h, P.to(h.dtype), P.to(h.dtype), A, 9.0),
    "RelationalDistillation": lambda h, **k: RelationalDistillation(**k)(h, TEXT.to(h.dtype), 9.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_budget_gives_the_same_answer(name):
    want = CALLS[name](h := leaf(H))
    want.backward()
    for limit in ({"memory_budget": 1}, {"memory_budget": 2**17}, {"memory_budget": 2**40}, {"chunk_size": 7}):
        got = CALLS[name](other := leaf(H), **limit)
        got.backward()
        assert_near(got, want)
        assert_near(other.grad, h.grad)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "PrototypeLoss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.cpu_only
def test_a_call_stays_within_its_budget(name, dtype):
    """All that a call and its backward allocate; without a budget they take more."""
    h, budget = leaf(H.to(dtype)), MIB

    def run(**limit):
        CALLS[name](h, **limit).backward()

    run()
    peak, _ = cost(lambda: run(memory_budget=budget))
    free, _ = cost(run)
    assert peak <= budget + 16 * H.numel() * 4  # and what is linear in the batch
    assert free > peak


def test_both_are_too_many():
    for call in (*CALLS.values(), lambda _, **k: ProtoLoss(**k)):
        with pytest.raises(ValueError, match=r"chunk_size and memory_budget must not both be given.* got 4 rows and 4096 bytes"):
            call(H, chunk_size=4, memory_budget=4096)
    loss = ProtoLoss(chunk_size=4)
    with pytest.raises(ValueError, match="must not both be given"):
        loss.memory_budget = 4096
    loss.chunk_size = None
    loss.memory_budget = 4096
    assert loss.settings.memory_budget == 4096


@pytest.mark.parametrize("name", CALLS)
def test_a_budget_is_a_number_of_bytes(name):
    with pytest.raises(ValueError, match="memory_budget must be at least 1, got 0"):
        CALLS[name](H, memory_budget=0)
    with pytest.raises(TypeError, match="memory_budget must be an int, got float"):
        CALLS[name](H, memory_budget=1e9)


def test_blocks_of_an_accelerator_are_as_large_as_the_budget_allows():
    """What was 8 to 100 blocks of a CPU's cache is one, or a few."""
    budget = SIZES["accelerator"].memory_budget
    for rows, columns in ((4096, 20000), (65536, 512), (8192, 8192)):
        assert rows_per_block(columns, torch.bfloat16, CUDA) >= rows
        assert rows_per_block(columns, torch.bfloat16, CPU) <= 1024
    assert -(-32768 // rows_per_block(32768, torch.float32, CUDA, copies=2)) <= 8
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.float16, 6)):
        for copies in (1, 3):
            rows = rows_per_block(20000, dtype, CUDA, copies=copies)
            assert rows * 20000 * size * copies <= budget < (rows + 1) * 20000 * size * copies


def test_the_given_limit_goes_before_the_table():
    assert rows_per_block(1000, torch.float32, CUDA, BlockLimit(chunk_size=3)) == 3
    assert rows_per_block(1000, torch.float32, CUDA, BlockLimit(memory_budget=40_000)) == 10
    assert rows_per_block(1000, torch.float32, CPU, BlockLimit(memory_budget=2**40)) == 1024  # the cache is no larger for it
    assert rows_per_block(10**9, torch.float32, CPU, BlockLimit(memory_budget=1)) == 1
    assert can_be_kept((100, 100), torch.float32, CPU, BlockLimit(memory_budget=40_000), 1, 0)
    assert not can_be_kept((100, 100), torch.float32, CPU, BlockLimit(memory_budget=40_000), 1, 1)
    assert can_be_dense(2**18, torch.float32, CPU, BlockLimit())
    assert not can_be_dense(2**18 + 1, torch.float32, CPU, BlockLimit())
    assert not can_be_dense(2**18, torch.float32, CPU, BlockLimit(memory_budget=2**20))
    assert not can_be_dense(4, torch.float32, CPU, BlockLimit(chunk_size=1))
