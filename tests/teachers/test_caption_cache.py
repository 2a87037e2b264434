"""The cache of an encoder's rows on disk: kills, full disks, other captions, encoders and processes, and those of 0.6."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import in_new_process, python_process
from text_encoder import CAPTIONS, TextEncoder

from protoclip_losses import TeacherAdapter
from protoclip_losses.teachers import PCA, caption_cache, files

EVERY = torch.arange(len(CAPTIONS))
REMEDY = "delete it or name another file"


def encoded(cache, encode=None, texts=CAPTIONS, **settings):
    encode = TextEncoder() if encode is None else encode
    return TeacherAdapter.from_encoder(
        encode, texts, cache, **{"dim": None, "batch_size": 5, "progress": False, "normalize": False, **settings}
    )


class Killed(BaseException):
    """Ends a run where it is, as a kill does: nothing in the library catches it."""


def whole_rows(folder, **settings):
    return encoded(folder / "whole.npy", **settings)[EVERY]


# --- what is on disk, against its record --------------------------------------------------------------------------------------


def test_rows_are_encoded_again_where_the_file_is_gone_and_the_record_is_not(tmp_path):
    encoded(tmp_path / "t.npy")
    (tmp_path / "t.npy").unlink()
    encode = TextEncoder()
    again = encoded(tmp_path / "t.npy", encode)
    assert encode.seen == CAPTIONS
    assert torch.equal(again[EVERY], whole_rows(tmp_path))


@pytest.mark.parametrize("done", [False, True], ids=["new", "deleted but for its record"])
@pytest.mark.parametrize("step", range(12))
def test_a_run_killed_at_any_write_never_leaves_rows_that_were_not_encoded(tmp_path, monkeypatch, step, done):
    """Every write of the first batch and of the second is the last one of a run; the next run has every row."""
    cache = tmp_path / "t.npy"
    if done:
        encoded(cache)
        cache.unlink()
    writes = iter(range(1000))

    def killing(real):
        def call(*args, **kwargs):
            if next(writes) == step:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (files.Path, "replace"), (files.Path, "unlink"), (os, "posix_fallocate")):
            patch.setattr(owner, name, killing(getattr(owner, name)))
        with pytest.raises(Killed):
            encoded(cache)
    resumed = encoded(cache)
    assert torch.equal(resumed[EVERY], whole_rows(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("t.*")) == ["t.npy", "t.npy.json"]


def test_a_run_killed_in_its_first_batch_starts_again(tmp_path):
    """Where an earlier record says that all is done: the file was deleted, but the record was not."""
    encoded(tmp_path / "t.npy")
    (tmp_path / "t.npy").unlink()
    process = python_process(
        """
import os, signal, sys
import numpy as np
from text_encoder import CAPTIONS, TextEncoder
from protoclip_losses import TeacherAdapter
writes = []
def kill(*args):
    writes.append(args)
    if len(writes) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
TeacherAdapter.from_encoder(TextEncoder(), CAPTIONS, sys.argv[1] + "/t.npy", dim=None, batch_size=5, progress=False)
""",
        tmp_path,
        6,  # the folder, the record, the folder, the file, the folder, the rows
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "t.npy").exists()
    assert torch.equal(encoded(tmp_path / "t.npy")[EVERY], whole_rows(tmp_path))


@pytest.mark.parametrize("size", [0, 100, 500])
def test_a_file_that_is_cut_short_is_an_error(tmp_path, size):
    encoded(tmp_path / "t.npy")
    os.truncate(tmp_path / "t.npy", size)
    with pytest.raises(ValueError, match=rf"cache .*t\.npy is damaged .*{REMEDY}"):
        encoded(tmp_path / "t.npy")


@pytest.mark.parametrize("rows", [np.ones((36, 5), "f2"), np.ones((35, 12), "f2"), np.ones((36, 12), "f4")])
def test_a_file_that_is_not_what_its_record_says_is_an_error(tmp_path, rows):
    encoded(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", rows)
    with pytest.raises(ValueError, match=rf"cache .*t\.npy must hold \(36, 12\) float16 as its record says, got .*{REMEDY}"):
        encoded(tmp_path / "t.npy")


def test_a_file_without_a_record_is_not_written_over(tmp_path):
    np.save(tmp_path / "t.npy", np.ones((36, 12), "f2"))
    before = (tmp_path / "t.npy").read_bytes()
    with pytest.raises(ValueError, match=rf"cache .*t\.npy must have its record t\.npy\.json with it.*{REMEDY}"):
        encoded(tmp_path / "t.npy")
    assert (tmp_path / "t.npy").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"texts": 3}', json.dumps(["a caption"] * 1000)])
def test_a_file_of_the_records_name_that_is_no_record_is_not_written_over(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t\.json must be the record of the cache .*t, got another file: name the cache"):
        encoded(tmp_path / "t")
    assert (tmp_path / "t.json").read_text() == content
    assert len(encoded(tmp_path / "t.npy")) == 36  # whose record has another name
    assert (tmp_path / "t.json").read_text() == content


def test_a_pca_that_is_cut_short_is_fitted_again(tmp_path):
    first = encoded(tmp_path / "t.npy", dim=4)
    for size in (0, 100, 700):
        os.truncate(tmp_path / "t.npy.pca.npz", size)
        assert torch.equal(encoded(tmp_path / "t.npy", dim=4)[EVERY], first[EVERY])


def test_the_pca_of_deleted_rows_is_not_that_of_the_new_ones(tmp_path):
    encoded(tmp_path / "t.npy", dim=4)
    (tmp_path / "t.npy").unlink()
    other = encoded(tmp_path / "t.npy", TextEncoder(seed=1), dim=4)
    assert torch.equal(other[EVERY], encoded(tmp_path / "alone.npy", TextEncoder(seed=1), dim=4)[EVERY])


def test_a_complete_cache_is_only_read(tmp_path):
    first = encoded(tmp_path / "t.npy", dim=4)
    tmp_path.chmod(0o555)
    try:
        assert torch.equal(encoded(tmp_path / "t.npy", dim=4)[EVERY], first[EVERY])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npy", "t.npy.json", "t.npy.pca.npz"]
    finally:
        tmp_path.chmod(0o755)


# --- a full disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["posix_fallocate", "fsync"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, when):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    calls, real = [], getattr(os, when)
    encoded(tmp_path / "small.npy")
    if when == "posix_fallocate":
        monkeypatch.setattr(os, when, full)
    else:  # once the file is there and its first rows are
        monkeypatch.setattr(os, when, lambda *a: full() if calls.append(a) or len(calls) > 12 else real(*a))
    with pytest.raises(OSError, match=r"No space left on device: .*t\.npy") as caught:
        encoded(tmp_path / "t.npy")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    assert torch.equal(encoded(tmp_path / "t.npy")[EVERY], whole_rows(tmp_path))


def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    one = encoded(tmp_path / "t.npy")
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    other = encoded(tmp_path / "other.npy")
    monkeypatch.undo()
    assert torch.equal(one[EVERY], whole_rows(tmp_path))
    assert torch.equal(other[EVERY], whole_rows(tmp_path))
    assert (tmp_path / "t.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_real_full_disk_kills_no_process(tmp_path):
    """A memory disk of 64 KB and a cache of 400: rows written through a memory map would end the process by SIGBUS."""
    code = """
import errno, sys
import numpy as np
from protoclip_losses import TeacherAdapter
texts = [f"caption {i}" for i in range(100)]
try:
    TeacherAdapter.from_encoder(lambda t: np.ones((len(t), 1000)), texts, sys.argv[1] + "/t.npy", dim=None, dtype="float32",
                                progress=False, batch_size=5)
except OSError as error:
    assert error.errno == errno.ENOSPC and "t.npy" in str(error), error
    print("named")
"""
    mounted = f'mount -t tmpfs -o size=64k none "{tmp_path}" && exec "{sys.executable}" -c "$1" "{tmp_path}"'
    command = ["unshare", "-Urm", "sh", "-c", mounted, "sh", code]
    if shutil.which("unshare") is None or subprocess.run([*command[:2], "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (run.returncode, run.stdout) == (0, "named\n"), run.stderr


# --- one name, one cache --------------------------------------------------------------------------------------------------------


def test_names_that_differ_after_the_last_dot_are_two_caches(tmp_path):
    others = [caption + " at night" for caption in CAPTIONS]
    one = encoded(tmp_path / "caps.train", dim=4)
    other = encoded(tmp_path / "caps.val", texts=others, dim=4)
    encode = TextEncoder()
    assert torch.equal(encoded(tmp_path / "caps.train", encode, dim=4)[EVERY], one[EVERY])
    assert torch.equal(encoded(tmp_path / "caps.val", encode, texts=others, dim=4)[EVERY], other[EVERY])
    assert encode.calls == [CAPTIONS[:1], others[:1]]
    names = [f"caps.{part}{suffix}" for part in ("train", "val") for suffix in ("", ".json", ".pca.npz")]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_captions_are_told_apart_wherever_one_ends(tmp_path):
    encoded(tmp_path / "t.npy", texts=["a", "b\0c"], batch_size=2)
    with pytest.raises(ValueError, match=rf"t\.npy was made from other texts \(2 of them\): {REMEDY}"):
        encoded(tmp_path / "t.npy", texts=["a\0b", "c"])
    digests = [caption_cache.strings_digest(texts) for texts in (["ab"], ["a", "b"], ["", "ab"], ["ab", ""], [], [""])]
    assert len(set(digests)) == 6


def test_a_caption_with_a_lone_surrogate_is_a_caption(tmp_path):
    texts = ["caf\udce9", "a cat", "\ud83d"]

    def encode(captions):
        return np.array([[len(c), 1.0] for c in captions])

    teacher = encoded(tmp_path / "t.npy", encode, texts, dim=1)
    assert torch.equal(encoded(tmp_path / "t.npy", encode, texts, dim=1)[EVERY[:3]], teacher[EVERY[:3]])
    with pytest.raises(ValueError, match="was made from other texts"):
        encoded(tmp_path / "t.npy", encode, ["caf\udcea", *texts[1:]])
    with pytest.raises(ValueError, match=r"got NaN or Inf for the caption 'caf\\udce9'"):
        encoded(tmp_path / "u.npy", lambda captions: encode(captions) * np.inf, texts)


# --- another encoder ------------------------------------------------------------------------------------------------------------


def test_the_same_captions_by_another_encoder_are_an_error(tmp_path):
    encoded(tmp_path / "t.npy")
    encode = TextEncoder(seed=1)
    with pytest.raises(ValueError, match=rf"cache .*t\.npy must hold what encode returns.*another encoder's.*{REMEDY}"):
        encoded(tmp_path / "t.npy", encode)
    assert encode.calls == [CAPTIONS[:1]]


@pytest.mark.parametrize("begun", [36, 10])
def test_an_encoder_of_another_width_is_an_error(tmp_path, begun):
    encode = TextEncoder()

    def stopping(captions):
        if len(encode.seen) >= begun:
            raise Killed
        return encode(captions)

    if begun < 36:
        with pytest.raises(Killed):
            encoded(tmp_path / "t.npy", stopping)
    else:
        encoded(tmp_path / "t.npy", stopping)
    with pytest.raises(ValueError, match=rf"cache .*t\.npy holds rows of width 12, got an encoder of width 7: {REMEDY}"):
        encoded(tmp_path / "t.npy", TextEncoder(width=7))


def test_an_interrupted_cache_is_not_continued_by_another_encoder(tmp_path):
    encode = TextEncoder()

    def stopping(captions):
        if len(encode.calls) == 2:
            raise Killed
        return encode(captions)

    with pytest.raises(Killed):
        encoded(tmp_path / "t.npy", stopping)
    with pytest.raises(ValueError, match="it is another encoder's"):
        encoded(tmp_path / "t.npy", TextEncoder(seed=1))
    assert json.loads((tmp_path / "t.npy.json").read_text())["done"] == 10


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_an_encoder_that_rounds_is_the_same_encoder(tmp_path, low):
    encoded(tmp_path / "t.npy")
    encoded(tmp_path / "t.npy", lambda captions: TextEncoder()(captions).to(low))
    encoded(tmp_path / "t.npy", lambda captions: TextEncoder()(captions) * 1.01)


def test_a_row_of_zeros_is_no_error(tmp_path):
    for _ in range(2):
        assert not encoded(tmp_path / "t.npy", lambda captions: np.zeros((len(captions), 3)))[EVERY].any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_complete_cache_in_another_type_is_an_error(tmp_path, dtype):
    other = {"float16": "float32", "float32": "float16"}[dtype]
    encoded(tmp_path / "t.npy", dtype=dtype)
    with pytest.raises(ValueError, match=rf"cache .*t\.npy was begun in {dtype}, got dtype='{other}': {REMEDY}"):
        encoded(tmp_path / "t.npy", dtype=other)


# --- what an encoder may return -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.tolist(),
        lambda x: list(x),
        lambda x: tuple(x.bfloat16().float()),
        lambda x: [row.numpy() for row in x],
        lambda x: x.double(),
        lambda x: x.numpy().astype(">f8"),
        lambda x: torch.nn.Parameter(x),
    ],
    ids=["lists", "list of tensors", "tuple of tensors", "list of arrays", "float64", "big-endian", "parameter"],
)
def test_rows_in_any_form_are_rows(tmp_path, form):
    rows = encoded(tmp_path / "t.npy", lambda captions: form(TextEncoder()(captions)))[EVERY]
    assert torch.allclose(rows, whole_rows(tmp_path), atol=2e-2)


def test_a_list_of_bfloat16_rows_is_read_right(tmp_path):
    rows = encoded(tmp_path / "t.npy", lambda captions: list(TextEncoder()(captions).bfloat16()), dtype="float32")[EVERY]
    with torch.no_grad():
        assert torch.equal(rows, TextEncoder()(CAPTIONS).bfloat16().float())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: {"sentence_embedding": x}, r"got dict with \['sentence_embedding'\]: return one of its values"),
        (lambda x: SimpleNamespace(last_hidden_state=x), "got SimpleNamespace"),
        (lambda x: None, "got NoneType"),
        (lambda x: "rows", "got str"),
        (lambda x: (row for row in x), "got generator"),
        (lambda x: [row[: i + 1].tolist() for i, row in enumerate(x)], "got list"),
        (lambda x: [row[: i + 1] for i, row in enumerate(x)], "got list"),
        (lambda x: (x[:, None].expand(-1, 4, -1), x), "got tuple"),
    ],
    ids=["dict", "object", "None", "string", "generator", "ragged lists", "ragged tensors", "tuple of outputs"],
)
def test_anything_but_rows_is_an_error_that_names_encode(tmp_path, form, message):
    with pytest.raises(TypeError, match=rf"encode must return a tensor or an array \(5, width\), {message}"):
        encoded(tmp_path / "t.npy", lambda captions: form(TextEncoder()(captions)))
    teacher = encoded(tmp_path / "t.npy")
    teacher._encode = lambda captions: form(TextEncoder()(captions))
    with pytest.raises(TypeError, match=rf"encode must return a tensor or an array \(5, width\), {message}"):
        teacher.encode(CAPTIONS[:5])


def test_a_model_output_is_an_error_that_names_its_parts(tmp_path):
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def encode(captions):
        x = TextEncoder()(captions)
        return outputs.BaseModelOutputWithPooling(last_hidden_state=x[:, None], pooler_output=x)

    message = r"got BaseModelOutputWithPooling with \['last_hidden_state', 'pooler_output'\]"
    with pytest.raises(TypeError, match=message):
        encoded(tmp_path / "t.npy", encode)


def test_an_encoder_that_changes_its_width_is_an_error(tmp_path):
    def encode(captions):
        return TextEncoder(width=12 if captions[0] == CAPTIONS[0] else 8)(captions)

    with pytest.raises(ValueError, match="encode must return rows of width 12 as it did before, got width 8"):
        encoded(tmp_path / "t.npy", encode)
    teacher = encoded(tmp_path / "u.npy")
    teacher._encode = encode
    with pytest.raises(ValueError, match="encode must return rows of width 12 as it did before, got width 8"):
        teacher.encode(CAPTIONS[3:5])


def test_no_caption_has_no_row(tmp_path):
    assert encoded(tmp_path / "t.npy", dim=4).encode([]).shape == (0, 4)
    with pytest.raises(ValueError, match=r"encode must return \(5, width\) for 5 captions, got shape \(5, 0\)"):
        encoded(tmp_path / "u.npy", lambda captions: np.ones((len(captions), 0)))


# --- two processes at once ------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time, warnings, torch
from text_encoder import CAPTIONS, TextEncoder
from protoclip_losses import TeacherAdapter
warnings.simplefilter("ignore")
encode = TextEncoder()
def slow(captions):
    if encode.calls == [] and sys.argv[2] == "first":
        print("in the first batch", flush=True)
        time.sleep(3)
    return encode(captions)
teacher = TeacherAdapter.from_encoder(slow, CAPTIONS, sys.argv[1] + "/t.npy", dim=4, batch_size=5, progress=False)
torch.save(teacher[torch.arange(36)], sys.argv[1] + f"/{sys.argv[2]}.pt")
print(len(encode.seen), flush=True)
"""


def test_a_second_process_waits_for_the_first_and_encodes_nothing(tmp_path):
    first = python_process(SLOW, tmp_path, "first")
    assert first.stdout.readline() == "in the first batch\n"
    second = python_process(SLOW, tmp_path, "second")
    outs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out for out, _ in outs] == ["36\n", "1\n"], outs
    rows = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("first", "second")]
    assert torch.equal(*rows)
    assert sorted(p.name for p in tmp_path.glob("t.*")) == ["t.npy", "t.npy.json", "t.npy.pca.npz"]


@pytest.mark.filterwarnings("ignore:.*is being written by another process")
def test_several_writers_at_once_end_with_the_same_rows_encoded_once(tmp_path):
    """Threads, as a lock belongs to an open file and not to a process."""
    encoders = [TextEncoder() for _ in range(6)]

    def run(encode):
        with torch.no_grad():
            return encoded(tmp_path / "t.npy", encode, dim=4, batch_size=1)[EVERY]

    with ThreadPoolExecutor(6) as pool:
        rows = list(pool.map(run, encoders))
    assert all(torch.equal(rows[0], other) for other in rows[1:])
    assert sorted(len(encode.seen) for encode in encoders) == [1, 1, 1, 1, 1, 36]
    assert not (tmp_path / "t.npy.lock").exists()


def test_waiting_is_said(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "t.npy.lock").touch()
    process = python_process(
        """
import fcntl, sys
lock = open(sys.argv[1] + "/t.npy.lock", "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
import time; time.sleep(2)
""",
        tmp_path,
    )
    assert process.stdout.readline() == "locked\n"
    assert fcntl
    with pytest.warns(UserWarning, match=r"t\.npy is being written by another process: waiting until it is complete"):
        encoded(tmp_path / "t.npy")
    process.communicate(timeout=60)
    assert not (tmp_path / "t.npy.lock").exists()


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    (tmp_path / "t.npy.lock").touch()
    assert len(encoded(tmp_path / "t.npy")) == 36
    assert not (tmp_path / "t.npy.lock").exists()


# --- caches of 0.6 --------------------------------------------------------------------------------------------------------------


def cache_of_0_6(path, texts=CAPTIONS, done=None, dtype="float16", dim=None):
    """The files that 0.6 wrote: the record without the suffix of the cache in its name, a digest of joined captions."""
    with torch.no_grad():
        rows = TextEncoder()(texts).numpy().astype(dtype)
    done = len(texts) if done is None else done
    rows[done:] = 0
    with open(path, "wb") as file:
        np.save(file, rows)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    record = {"texts": digest, "count": len(texts), "done": done, "dtype": dtype}
    path.with_suffix(".json").write_text(json.dumps(record))
    if dim is not None:
        pca = PCA.fit([torch.from_numpy(rows).float()], dim)
        of = json.dumps({"texts": digest, "normalize": False, "dim": dim})
        np.savez(path.with_suffix(".pca.npz"), mean=pca.mean.numpy() + 1, components=pca.components.numpy(), of=of)


@pytest.mark.parametrize("name", ["t.npy", "t", "caps.train"])
def test_a_complete_cache_of_0_6_is_read_as_it_is(tmp_path, name):
    cache_of_0_6(tmp_path / name, dim=4)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    encode = TextEncoder()
    teacher = encoded(tmp_path / name, encode, dim=4)
    assert encode.calls == [CAPTIONS[:1]]
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    rows = torch.from_numpy(np.load(tmp_path / name)).float()
    assert torch.equal(teacher[EVERY], PCA(teacher.pca.mean, teacher.pca.components)(rows))
    assert torch.allclose(teacher.pca.mean, rows.mean(0) + 1, atol=1e-5)  # the one that was saved


@pytest.mark.parametrize("name", ["t.npy", "t"])
def test_an_interrupted_cache_of_0_6_is_continued(tmp_path, name):
    cache_of_0_6(tmp_path / name, done=15)
    encode = TextEncoder()
    teacher = encoded(tmp_path / name, encode)
    assert encode.seen == CAPTIONS[:1] + CAPTIONS[15:]
    assert torch.equal(teacher[EVERY], whole_rows(tmp_path))
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (record["format"], record["done"], record["width"]) == (1, 36, 12)
    assert sorted(p.name for p in tmp_path.glob("t*")) == [name, f"{name}.json"]


def test_rows_that_0_6_never_wrote_are_noticed(tmp_path):
    """Killed in the first batch, under the record of the file that was there before."""
    cache_of_0_6(tmp_path / "t.npy", done=36)
    np.save(tmp_path / "t.npy", np.zeros((36, 12), "f2"))
    with pytest.raises(ValueError, match=rf"cache .*t\.npy must hold what encode returns.*{REMEDY}"):
        encoded(tmp_path / "t.npy")


def test_a_cache_of_0_6_of_other_captions_is_an_error(tmp_path):
    cache_of_0_6(tmp_path / "t.npy")
    with pytest.raises(ValueError, match=rf"t\.npy was made from other texts \(36 of them\): {REMEDY}"):
        encoded(tmp_path / "t.npy", texts=CAPTIONS[::-1])


def test_the_shared_record_of_0_6_serves_no_other_cache(tmp_path):
    cache_of_0_6(tmp_path / "caps.train")
    np.save(tmp_path / "caps.val.npy", np.ones((36, 12), "f2"))
    (tmp_path / "caps.val.npy").rename(tmp_path / "caps.val")  # whose record was written over by the other's
    with pytest.raises(ValueError, match=rf"caps\.val was made from other texts \(36 of them\): {REMEDY}"):
        encoded(tmp_path / "caps.val", texts=CAPTIONS[::-1])
    assert len(encoded(tmp_path / "caps.train")) == 36


def test_a_record_of_0_6_does_not_speak_for_a_cache_that_has_its_own(tmp_path):
    encoded(tmp_path / "caps.val", texts=CAPTIONS[::-1])
    cache_of_0_6(tmp_path / "caps.train")
    with pytest.raises(ValueError, match=rf"caps\.val was made from other texts \(36 of them\): {REMEDY}"):
        encoded(tmp_path / "caps.val")


def test_the_record_of_another_cache_of_0_7_is_no_record_of_0_6(tmp_path):
    encoded(tmp_path / "t")
    shutil.copy(tmp_path / "t", tmp_path / "t.npy")
    with pytest.raises(ValueError, match=r"cache .*t\.npy must have its record t\.npy\.json with it, got the file alone"):
        encoded(tmp_path / "t.npy")


def test_the_record_of_another_cache_of_0_6_is_not_written_over(tmp_path):
    cache_of_0_6(tmp_path / "caps.train.npy")
    before = (tmp_path / "caps.train.json").read_bytes()
    with pytest.raises(ValueError, match=r"caps\.train\.json must be the record of the cache .*caps\.train, got another file"):
        encoded(tmp_path / "caps.train")
    assert (tmp_path / "caps.train.json").read_bytes() == before
    assert len(encoded(tmp_path / "caps.train.npy")) == 36


def test_captions_that_hold_nul_are_not_taken_for_those_of_0_6(tmp_path):
    cache_of_0_6(tmp_path / "t.npy", texts=["a", "b\0c"])
    with pytest.raises(ValueError, match="was made from other texts"):
        encoded(tmp_path / "t.npy", texts=["a\0b", "c"])


def test_a_deleted_cache_of_0_6_leaves_no_record_that_is_believed_later(tmp_path):
    cache_of_0_6(tmp_path / "t.npy")
    (tmp_path / "t.npy").unlink()
    encode = TextEncoder()

    def stopping(captions):
        if len(encode.calls) == 2:
            raise Killed
        return encode(captions)

    with pytest.raises(Killed):
        encoded(tmp_path / "t.npy", stopping)
    assert not (tmp_path / "t.json").exists()
    (tmp_path / "t.npy.json").unlink()
    with pytest.raises(ValueError, match="must have its record"):
        encoded(tmp_path / "t.npy")


def test_a_cache_needs_no_more_memory_than_a_batch(tmp_path):
    """40,000 rows of 1,000 in float16, 80 MB, are written by batches of 500."""
    out = in_new_process(
        """
import resource, sys
import numpy as np
from protoclip_losses import TeacherAdapter
texts = [str(i) for i in range(40_000)]
def encode(captions):
    return np.ones((len(captions), 1000), "f4")
encode(texts[:500])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
TeacherAdapter.from_encoder(encode, texts, sys.argv[1] + "/t.npy", dim=None, batch_size=500, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""",
        tmp_path,
    )
    assert int(out) < 40_000  # KiB
