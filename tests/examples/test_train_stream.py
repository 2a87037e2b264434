"""examples/train_stream.py as its user runs it, on real shards with broken members, killed and resumed."""

import signal
import tarfile
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from example_runs import (
    TORCHRUN,
    assert_clustering_is_in_tensorboard,
    assert_same_end,
    holds_prototypes,
    last_state,
    records,
    run,
    run_until,
    scalars,
)
from pair_files import add, jpeg
from pairs import Pairs, decode, emoji_pairs

from protoclip_losses import EpisodicClusterer, FeatureCollector, ProtoLoss, StreamEpisodes

wds = pytest.importorskip("webdataset")
SHARDS, EACH = 8, 20
STREAM = {"script": "train_stream.py"}
BROKEN = {(1, 4): "jpg", (2, 7): "txt", (5, 0): "missing"}


@pytest.fixture(scope="module")
def emoji() -> Pairs:
    return emoji_pairs(40, styles=("twemoji",))


@pytest.fixture(scope="module")
def shards(emoji: Pairs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards in img2dataset's layout: a truncated jpeg, an empty caption and a missing jpeg among 160 pairs."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for place in range(EACH):
                i = 11 * (EACH * shard + place) % len(emoji)
                broken = BROKEN.get((shard, place))
                data = jpeg(emoji, i)
                if broken != "missing":
                    add(tar, f"{i:09d}.jpg", data[: len(data) // 2] if broken == "jpg" else data)
                add(tar, f"{i:09d}.txt", b" " if broken == "txt" else emoji.captions[i].encode())
    return str(folder / f"{{00000..{SHARDS - 1:05d}}}.tar")


def arguments(shards: str) -> list[str]:
    tiny = ["--shards-per-episode", "6", "--episodes", "4", "--num-prototypes", "8", "--batch-size", "8", "--shuffle", "16"]
    return ["--shards", shards, "--teacher", "none", "--log-every", "1", "--save-every", "3", *tiny]


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_shards_are_extracted_clustered_and_trained(emoji: Pairs, shards: str, workers: int) -> None:
    """The library alone, on real shards: colours of pictures as image features, letters of captions as text features."""
    from train_stream import decode_sample, read_shard
    from webdataset.shardlists import expand_urls

    stream = StreamEpisodes(list(expand_urls(shards)), SHARDS, seed=1)
    episode = stream.episode(0)

    def features(pictures: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        letters = torch.stack([torch.bincount(torch.tensor(list(c.encode())) % 32, minlength=32) for c in captions]).float()
        colours = torch.nn.functional.interpolate(pictures.float(), (3, 3)).flatten(1)
        return torch.nn.functional.normalize(colours - 128, dim=1), torch.nn.functional.normalize(letters[:, :27], dim=1)

    decode_here = partial(decode_sample, side=40)
    collector, seen = FeatureCollector(dim=27), {}
    extraction = episode.batches(read_shard, decode_here, 16, num_workers=workers)
    for index, (pictures, captions) in extraction:
        collector.update(index, *features(pictures, captions))
        seen |= {number: (picture, c) for number, picture, c in zip(index.tolist(), pictures, captions, strict=True)}
    assert (extraction.samples, extraction.dropped) == (SHARDS * EACH, 3)
    loss = ProtoLoss()
    loss.set_prototypes(EpisodicClusterer(10).build(collector.bank()))
    again = {}
    for index, (pictures, captions) in episode.batches(
        read_shard, decode_here, 16, num_workers=workers, shuffle_buffer=40, only=collector.index
    ):
        assert torch.isfinite(loss(*features(pictures, captions), 10.0, index=index))
        again |= {number: (picture, c) for number, picture, c in zip(index.tolist(), pictures, captions, strict=True)}
    assert again.keys() == seen.keys()
    for number, (picture, caption) in seen.items():
        assert caption == again[number][1]
        assert torch.equal(picture, again[number][0])
        # It is the picture of that number's place in that number's shard.
        members = list(islice(read_shard(episode.shards[number >> 32]), number % 2**32 + 1))
        assert torch.equal(decode(members[-1]["jpg"], 40), picture)
        assert " ".join(members[-1]["txt"].decode().split()) == caption


@pytest.mark.slow
def test_killed_in_each_pass_it_ends_with_the_same_weights(shards: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    written = run(*arguments(shards), "--run-dir", str(whole), **STREAM)
    assert "samples left out, as they do not decode" in written
    assert "clustering" in written
    interruptions = [
        ("episode 1 training: +[1-9]", signal.SIGKILL),
        ("episode 2 extraction: +[5-9]", signal.SIGTERM),
        ("episode 2 extraction: +1[0-9]", signal.SIGKILL),
        ("episode 3/4: clustering", signal.SIGKILL),
        ("episode 3 training: +[4-9]", signal.SIGINT),
        ("episode 4 extraction: +[4-9]", signal.SIGKILL),
    ]
    for number, (pattern, kind) in enumerate(interruptions):
        resume = ["--resume"] if number else arguments(shards)
        written = run_until(pattern, kind, 0.0, *resume, "--run-dir", str(killed), **STREAM)
        assert number == 0 or "resuming after step" in written
        assert kind == signal.SIGKILL or "stopped and saved" in written
    run("--run-dir", str(killed), "--resume", **STREAM)
    assert holds_prototypes(whole)
    assert_same_end(whole, killed)
    assert_clustering_is_in_tensorboard(whole, killed, builds=3)
    assert {record["proto_loss"] > 0 for record in records(whole) if record["episode"] > 0} == {True}
    steps = [step for step, _ in scalars(whole, "episode/clustering_seconds")]
    assert len(steps) == 3
    assert steps == sorted({step for step, _ in scalars(killed, "episode/clustering_seconds")})


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_are_stopped_and_go_on(shards: str, tmp_path: Path) -> None:
    how = {**STREAM, "launcher": TORCHRUN}
    run(*arguments(shards), "--run-dir", str(tmp_path / "whole"), **how)
    stopped = str(tmp_path / "stopped")
    # torchrun ends with 1 whenever it is sent a signal; both processes have saved.
    written = run_until(
        "episode 2 extraction: +[1-9]", signal.SIGTERM, 0.0, *arguments(shards), "--run-dir", stopped, status=1, **how
    )
    assert "stopped and saved" in written
    assert last_state(tmp_path / "stopped")["progress"]["step"] < last_state(tmp_path / "whole")["progress"]["step"]
    run("--resume", "--run-dir", stopped, **how)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_without_arguments_it_makes_shards_learns_and_says_how_well(tmp_path: Path) -> None:
    written = run("--run-dir", str(tmp_path), "--episodes", "3", "--shards-per-episode", "8", **STREAM, threads=2)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 31
    assert records(tmp_path)[-1]["proto_external_loss"] > 0
    recall = [float(line.split("image_to_text_recall@10 ")[1].split()[0]) for line in written.splitlines() if "recall@10" in line]
    assert len(recall) == 2
    assert recall[1] > recall[0]


def test_the_arguments_of_a_run_stay(shards: str, tmp_path: Path) -> None:
    run(*arguments(shards), "--run-dir", str(tmp_path), "--episodes", "1", **STREAM)
    written = run("--run-dir", str(tmp_path), "--resume", "--readers", "5", **STREAM, status=2)
    assert "these differ: --readers (was 2)" in written
