"""What train_cc3m.py trains on by its arguments: pairs, and the external teacher's features of their captions."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from encoders import minilm_encoder
from first_pass import number_pairs
from pairs import Pairs, emoji_pairs, hold_out

from protoclip_losses import TeacherAdapter

log = logging.getLogger("train")


def load_pairs(args: argparse.Namespace, run_dir: Path, side: int, rank: int, world_size: int) -> tuple[Pairs, Pairs]:
    """(training pairs, held-out pairs). Rank 0 numbers files first and the others read the index it leaves."""
    if rank > 0:
        dist.barrier()
    if args.train_data is None:
        pairs = emoji_pairs(side)
        log.info("embedded emoji: Twemoji (CC BY 4.0, Twitter and contributors) and OpenMoji (CC BY-SA 4.0) drawings")
    else:
        pairs = number_pairs(args.train_data, run_dir / "train_pairs.npz", side, args.workers)
    if args.val_data is not None:
        train, held_out = pairs, number_pairs(args.val_data, run_dir / "val_pairs.npz", side, args.workers)
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
            raise SystemExit(f"{len(part)} {name} pairs of {len(pairs)}: bring more data, or change --held-out or --val-data")
    return train, held_out


def load_teacher(args: argparse.Namespace, train: Pairs, run_dir: Path, device: torch.device) -> dict[str, TeacherAdapter]:
    """External teachers by name; a row per training pair each."""
    if args.teacher == "none":
        return {}
    width = min(args.teacher_width, len(train))
    if args.teacher == "minilm":
        cache = run_dir / "minilm.npy"
        return {"minilm": TeacherAdapter.from_encoder(minilm_encoder(device), list(train.captions), cache=cache, dim=width)}
    if not Path(args.teacher).is_file():
        raise SystemExit(f"--teacher {args.teacher}: no such file; wanted minilm, none, or a .npy file")
    teacher = TeacherAdapter.from_file(args.teacher)
    if len(teacher) != len(train):
        raise SystemExit(
            f"--teacher {args.teacher} has {len(teacher)} rows and there are {len(train)} training pairs: wanted a row for each "
            f"line of {run_dir / 'train_captions.txt'}, in that order"
        )
    if width < teacher.dim:
        teacher = TeacherAdapter.from_file(args.teacher, dim=width)
    return {Path(args.teacher).stem: teacher}
