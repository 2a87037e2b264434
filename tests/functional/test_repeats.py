"""Captions that repeat in a batch, against the dense form: value, gradients, blocks, both branches, dtypes."""

import dense
import pytest
import torch
from cases import assert_near, assert_same, leaf, set_sizes, unit

from protoclip_losses import InfoNCE, _dtypes
from protoclip_losses.functional import caption_ids, info_nce
from protoclip_losses.kernels import info_nce_small_blocks

IDS = torch.tensor([5, 7, 5, -3, 7, 5, 2**62, 0, -3, 1, 4])
EVERY = {"some": IDS, "none": torch.arange(11), "all": torch.zeros(11, dtype=torch.int64)}


def batch(dtype=torch.float64, scale=9.0):
    return unit(11, 5, 0, dtype), unit(11, 5, 1, dtype), torch.tensor(scale, dtype=dtype)


@pytest.mark.parametrize("reach", [60.0, -1e9, None, "few"], ids=["rescaled", "exact columns", "large blocks", "few logits"])
@pytest.mark.parametrize("budget", [2**40, 0], ids=["cached", "twice"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("ids", EVERY)
@pytest.mark.parametrize("repeats", ["mask", "share"])
def test_value_and_gradients(repeats, ids, chunk_size, budget, reach, monkeypatch):
    set_sizes(monkeypatch, memory_budget=budget, dense_logits=2**62 if reach == "few" else 0)
    if reach is None:
        monkeypatch.setattr(_dtypes, "READABLE", set())
    elif reach != "few":
        monkeypatch.setattr(info_nce_small_blocks, "REACH", reach)
    assert_same(
        lambda *x: info_nce(*x, ids=EVERY[ids], repeats=repeats, chunk_size=chunk_size),
        lambda *x: dense.info_nce_of_repeats(*x, EVERY[ids], repeats),
        *batch(),
    )


@pytest.mark.parametrize("repeats", ["mask", "share"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(repeats, dtype):
    image, text, _ = batch(dtype)
    scale = torch.tensor(9.0)
    got = info_nce(image, text, scale, ids=IDS, repeats=repeats)
    assert got.dtype == torch.float32
    assert_near(got, dense.info_nce_of_repeats(image, text, scale, IDS, repeats), {torch.float32: 1e-6}.get(dtype, 2e-2))


@pytest.mark.parametrize("repeats", ["mask", "share"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_rows(repeats, chunk_size):
    image, text, scale = (leaf(x) for x in batch())
    rows = info_nce(image, text, scale, ids=IDS, repeats=repeats, reduction="none", chunk_size=chunk_size)
    assert_near(rows.mean(), dense.info_nce_of_repeats(image, text, scale, IDS, repeats))
    total = info_nce(image, text, scale, ids=IDS, repeats=repeats, reduction="sum")
    inputs = [image, text, scale]
    for one, other in zip(*(torch.autograd.grad(x, inputs) for x in (total, rows.sum())), strict=True):
        assert_near(one, other)


def test_without_repeats_it_is_info_nce():
    plain = info_nce(*batch())
    for repeats in ("mask", "share"):
        assert_near(info_nce(*batch(), ids=torch.arange(11), repeats=repeats), plain)
        assert_near(InfoNCE(repeats=repeats)(*batch()), plain)
        assert_near(InfoNCE(repeats=repeats)(*batch(), ids=IDS), dense.info_nce_of_repeats(*batch(), IDS, repeats))


@pytest.mark.parametrize("repeats", ["mask", "share"])
def test_in_a_compiled_graph(repeats):
    compiled = torch.compile(lambda *x: info_nce(*x, ids=IDS, repeats=repeats), backend="aot_eager", fullgraph=repeats == "mask")
    assert_same(compiled, lambda *x: dense.info_nce_of_repeats(*x, IDS, repeats), *batch())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": IDS, "repeats": None}, ValueError, "ids need repeats='mask' or 'share'"),
        ({"ids": IDS[:4]}, ValueError, "ids must have 11 entries as image_features has rows, got 4"),
        ({"ids": IDS.float()}, TypeError, "ids must be int64"),
        ({"repeats": "drop"}, ValueError, "repeats must be 'mask', 'share' or None, got 'drop'"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        info_nce(*batch(), **arguments)
    with pytest.raises(error, match=message):
        InfoNCE(repeats=arguments.get("repeats", "mask"))(*batch(), ids=arguments.get("ids"))


def test_captions_have_the_id_of_their_folded_text():
    captions = ["A dog", "a  dog\n", "a dog\u2003", "Cafe\u0301", "caf\u00e9", "STRASSE", "straße", "a cat", "", " ", "\ud800"]
    ids = caption_ids(captions)
    groups = [[0, 1, 2], [3, 4], [5, 6], [7], [8, 9], [10]]
    assert ids.dtype == torch.int64
    assert [[i for i in range(len(ids)) if ids[i] == ids[group[0]]] for group in groups] == groups
    assert caption_ids(["a dog"]).tolist() == [-4081912340589182210]  # in every process
    with pytest.raises(TypeError, match="texts must be a list of strings"):
        caption_ids("a dog")
