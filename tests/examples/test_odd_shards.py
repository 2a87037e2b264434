"""examples/train_stream.py on shards that hold too little, nothing, or no pictures."""

import argparse
import json
import tarfile
from pathlib import Path

import pytest
import torch
from example_runs import run
from pair_files import add, jpeg
from pairs import Pairs, emoji_pairs

from protoclip_losses import StreamEpisodes

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def emoji() -> Pairs:
    return emoji_pairs(40, styles=("twemoji",))


def write_shard(path: Path, emoji: Pairs, count: int, with_pictures: bool = True) -> str:
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            if with_pictures:
                add(tar, f"{i:03d}.jpg", jpeg(emoji, i))
            add(tar, f"{i:03d}.txt", emoji.captions[i].encode())
    return str(path)


TINY = ["--teacher", "none", "--shards-per-episode", "1", "--num-prototypes", "8", "--batch-size", "4", "--shuffle", "8"]


def test_episodes_with_too_few_samples_train_without_prototypes_and_name_their_shards(emoji: Pairs, tmp_path: Path) -> None:
    for number, count in enumerate([20, 0, 3]):
        write_shard(tmp_path / f"{number}.tar", emoji, count)
    write_shard(tmp_path / "3.tar", emoji, 5, with_pictures=False)
    written = run(
        *TINY,
        "--shards",
        str(tmp_path / "{0..3}.tar"),
        "--episodes",
        "9",
        "--run-dir",
        str(tmp_path / "run"),
        script="train_stream.py",
    )
    for number, count in ((1, 0), (2, 3), (3, 0)):
        assert (
            f"InfoNCE only; there must be 8 samples for --num-prototypes, at least one of them on each process, got [{count}]: "
            f"{count} in {tmp_path / str(number)}.tar" in written
        )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line["proto_loss"] > 0 for line in lines)


def test_a_stream_without_pictures_is_an_error_that_names_the_shard(emoji: Pairs, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", emoji, 20, with_pictures=False)
    arguments = ["--shards", shard, "--episodes", "2", "--run-dir", str(tmp_path / "run")]
    written = run(*TINY, *arguments, status=1, script="train_stream.py")
    assert "missing picture (sample" in written
    assert f"of {shard})" in written


@pytest.mark.parametrize("count", [0, 40])
def test_a_stream_with_few_captions_has_a_narrow_teacher(
    count: int, emoji: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_stream

    def encode(captions: list[str]) -> torch.Tensor:
        return torch.stack([torch.rand(80, generator=torch.Generator().manual_seed(len(caption))) for caption in captions])

    shards = [write_shard(tmp_path / "0.tar", emoji, 0), write_shard(tmp_path / "1.tar", emoji, count)]
    monkeypatch.setattr(train_stream, "minilm_encoder", lambda device: encode)
    args, stream = argparse.Namespace(teacher="minilm"), StreamEpisodes(shards, 1)
    if count:
        teacher = train_stream.load_teacher(args, stream, tmp_path, torch.device("cpu"))
        assert teacher is not None
        assert (len(teacher), teacher.dim) == (40, 40)
    else:
        with pytest.raises(SystemExit, match=r"--shards must have captions, got none in 2 shards from .*0.tar"):
            train_stream.load_teacher(args, stream, tmp_path, torch.device("cpu"))


def test_a_cut_shard_and_an_empty_file_are_named(emoji: Pairs, tmp_path: Path) -> None:
    from train_stream import read_shard

    shard = Path(write_shard(tmp_path / "0.tar", emoji, 20))
    shard.write_bytes(shard.read_bytes()[:30_700])  # in the middle of a member
    (tmp_path / "1.tar").write_bytes(b"")
    for path in (shard, tmp_path / "1.tar"):
        with pytest.raises(tarfile.TarError, match=str(path)):
            list(read_shard(str(path)))


def test_shards_from_a_command_may_be_read_in_part(emoji: Pairs, tmp_path: Path) -> None:
    from train_stream import read_shard

    shard = write_shard(tmp_path / "0.tar", emoji, 100)
    samples = read_shard(f"pipe:cat {shard}; sleep 0.1; cat {shard}")
    assert next(samples)["__key__"] == "000"
    samples.close()  # type: ignore[attr-defined]
    assert len(list(read_shard(f"pipe:cat {shard}"))) == 100
