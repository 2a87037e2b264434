"""What the scripts train on, by their arguments: pairs or shards, and the external teacher's features of the captions."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from encoders import minilm_encoder
from files import changed_files, file_marks, replacing
from first_pass import number_pairs
from pairs import Pairs, emoji_pairs, hold_out
from PIL import Image

from protoclip_losses import Clustering, EpisodicClusterer, KMeansResult, TeacherAdapter

log = logging.getLogger("train")
TEACHERS = "words, minilm, none, .npy files, or what python -m protoclip_losses.cluster wrote"


def load_pairs(args: argparse.Namespace, run_dir: Path, side: int, rank: int, world_size: int) -> tuple[Pairs, Pairs]:
    """(training pairs, held-out pairs) of train_cc3m.py. Rank 0 indexes the files first; the others read its index."""
    if rank > 0:
        dist.barrier()
    if args.train_data is None:
        pairs = emoji_pairs(side)
        log.info("embedded emoji: Twemoji (CC BY 4.0, Twitter and contributors) and OpenMoji (CC BY-SA 4.0) drawings")
    else:
        pairs = number_pairs(args.train_data, run_dir / "train_pairs.npz", side, args.workers, args.resume, rank > 0)
    if args.val_data is not None:
        cache = run_dir / "val_pairs.npz"
        train, held_out = pairs, number_pairs(args.val_data, cache, side, args.workers, args.resume, rank > 0)
    else:
        train, held_out = hold_out(pairs, args.held_out or (0.2 if args.train_data is None else 0.02))
    if rank == 0:
        # Row i of a teacher file is the teacher's feature of line i.
        with open(run_dir / "train_captions.txt", "w", encoding="utf-8") as file:
            file.writelines(f"{caption}\n" for caption in train.captions)
        if world_size > 1:
            dist.barrier()
    log.info("%s training pairs, %s held out", f"{len(train):,}", f"{len(held_out):,}")
    for name, part in (("training", train), ("held-out", held_out)):
        if len(part) < 2:
            raise SystemExit(
                f"there must be at least 2 {name} pairs, got {len(part)} of {len(pairs)}: add data, or change --held-out or "
                "--val-data"
            )
    return train, held_out


def load_teachers(
    args: argparse.Namespace, train: Pairs, run_dir: Path, device: torch.device
) -> tuple[dict[str, TeacherAdapter], dict[str, Clustering]]:
    """External teachers of train_cc3m.py by name: features of each training pair, and clusters that were found before."""
    given = [] if args.teacher == ["none"] else args.teacher
    # Files first: what is wrong with one is said before captions are encoded.
    found = {
        text: _load_teacher(text, args.teacher_width, train, run_dir, device)
        for text in sorted(given, key=lambda text: text in ("words", "minilm"))
    }
    named = dict(found[text] for text in given)
    if len(named) < len(given):
        raise SystemExit(f"--teacher must name each teacher once, got {' '.join(given)}")
    if taken := named.keys() & {"image", "text"}:
        raise SystemExit(
            f"--teacher must not be named like a modality, got {', '.join(sorted(taken))}: rename the file or folder"
        )
    teachers = {name: teacher for name, teacher in named.items() if isinstance(teacher, TeacherAdapter)}
    clusterings = {name: teacher for name, teacher in named.items() if isinstance(teacher, Clustering)}
    if clusterings and (args.method == "online" or (args.weight_distill and not teachers)):
        option = "--method online" if args.method == "online" else "--weight-distill"
        raise SystemExit(f"--teacher must have features with {option}, got clusters: {', '.join(clusterings)}")
    return teachers, clusterings


def _load_teacher(
    text: str, width: int, train: Pairs, run_dir: Path, device: torch.device
) -> tuple[str, TeacherAdapter | Clustering]:
    captions, path = list(train.captions), Path(text)
    if text == "words":
        return text, TeacherAdapter.from_captions(captions, width, run_dir / "words.npy")
    width = min(width, len(train))
    if text == "minilm":
        return text, TeacherAdapter.from_encoder(minilm_encoder(device), captions, cache=run_dir / "minilm.npy", dim=width)
    if path.is_dir() or (path.is_file() and not _is_npy(path)):
        return path.resolve().name if path.is_dir() else path.stem, _load_clusters(path, train, run_dir)
    if not path.is_file():
        raise SystemExit(f"--teacher must be {TEACHERS}, got {text}, which does not exist")
    teacher = TeacherAdapter.from_file(path)
    if len(teacher) != len(train):
        raise SystemExit(
            f"--teacher must have a row for each of the {len(train)} lines of {run_dir / 'train_captions.txt'}, in that order, "
            f"got {text} with {len(teacher)} rows"
        )
    if width < teacher.dim:
        teacher = TeacherAdapter.from_file(path, dim=width)
    return path.stem, teacher


def _is_npy(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix == ".npy" or file.read(6) == np.lib.format.MAGIC_PREFIX


def _load_clusters(path: Path, train: Pairs, run_dir: Path) -> Clustering:
    """What ``python -m protoclip_losses.cluster`` wrote: labels stay on the disk, and K-means need not run."""
    try:
        result = KMeansResult.load(path)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"--teacher must be {TEACHERS}, got {path}: {error}") from error
    if result.index is not None or len(result.labels) != len(train):
        ids = "" if result.index is None else " and ids of their own"
        raise SystemExit(
            f"--teacher must have a label for each of the {len(train)} lines of {run_dir / 'train_captions.txt'}, in that order, "
            f"got {path} with {len(result.labels)} labels{ids}"
        )
    return Clustering(result.centroids, result.labels)


class GivenClusters:
    """Which clusters a run was given: a run that is resumed must be given the same."""

    def __init__(self, clusterings: Mapping[str, Clustering]) -> None:
        self.checksums = {name: clustering.checksum() for name, clustering in clusterings.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"checksums": self.checksums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if changed := [name for name, checksum in self.checksums.items() if state["checksums"].get(name) != checksum]:
            raise ValueError(
                f"--teacher must be the clusters that the run began with, and these are others: {', '.join(changed)}"
            )


def cluster_teachers(
    teachers: dict[str, TeacherAdapter], clusterer: EpisodicClusterer, run_dir: Path, rank: int
) -> dict[str, Clustering]:
    """Clusterings of all training pairs, by teacher: computed once, and kept in the run folder."""
    found = {}
    for name, teacher in teachers.items():
        path = run_dir / f"{name}.clusters.pt"
        if path.exists():
            found[name] = Clustering(**torch.load(path, weights_only=True))
            continue
        log.info("clustering %s pairs by %s, once for all episodes", f"{len(teacher):,}", name)
        found[name] = clusterer.fit_teacher(teacher)
        if dist.is_initialized():
            dist.barrier()  # no rank may look for the file before all have
        if rank == 0:
            with replacing(path) as partial:
                torch.save({"centroids": found[name].centroids, "labels": found[name].labels}, partial)
    return found


def find_shards(args: argparse.Namespace, run_dir: Path, side: int, rank: int) -> tuple[list[str], Pairs | None]:
    """(shards, held-out pairs) of train_stream.py. Without --shards, rank 0 writes the embedded emoji as shards of 100."""
    import webdataset as wds
    from webdataset.shardlists import expand_urls

    if args.shards is not None:
        shards = [str(shard) for shard in expand_urls(args.shards)]
        if rank > 0:  # rank 0 alone evaluates
            return shards, None
        check_shards(shards, run_dir / "shards.npy", args.resume)
        val_data = args.val_data
        return shards, None if val_data is None else number_pairs(val_data, run_dir / "val_pairs.npz", side, resume=args.resume)
    train, held_out = hold_out(emoji_pairs(side), 0.2)
    order = torch.split(torch.randperm(len(train), generator=torch.Generator().manual_seed(0)), 100)
    shards = [str(run_dir / "shards" / f"{number:05d}.tar") for number in range(len(order))]
    if rank == 0 and not args.resume:
        (run_dir / "shards").mkdir()
        for shard, rows in zip(shards, order, strict=True):
            with wds.TarWriter(shard) as writer:
                for i in rows.tolist():
                    picture = Image.fromarray(train.pictures[i].permute(1, 2, 0).numpy())
                    writer.write({"__key__": f"{i:09d}", "png": picture, "txt": train.captions[i]})
    if dist.is_initialized():
        dist.barrier()
    return shards, replace(held_out, labels={})  # labels are evaluated with the training pairs, which have no index here


def check_shards(shards: list[str], record: Path, resume: bool) -> None:
    """Record which files a stream is read from; on resume, SystemExit if one of those on this disk has changed."""
    marks = file_marks(shards)
    if resume and record.exists():
        if changed := changed_files(shards, np.load(record).tolist(), marks):
            raise SystemExit(
                f"--resume needs the shards as the run began with them, but these have changed: {changed}; if they "
                f"are only copies with another date, delete {record}"
            )
        return
    with replacing(record) as partial:
        np.save(partial, np.array(marks, np.int64))
