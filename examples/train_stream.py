"""Train ProtoCLIP on a stream: WebDataset shards, read from their beginning, without numbering pairs first.

Shards made from the embedded pairs (emoji from pip packages), on two CPU cores:
    python examples/train_stream.py

Shards of your own, evaluated on pairs of your own; an episode is a stretch of 20 shards, and memory grows with it alone:
    python examples/train_stream.py --shards 'cc3m/{00000..00329}.tar' --shards-per-episode 20 --num-prototypes 20000 \
        --shuffle 5000 --readers 8 --val-data val_pairs.tsv

Several processes, each with whole shards of its own:
    torchrun --standalone --nproc-per-node 2 examples/train_stream.py

Stop it with Ctrl-C, SIGTERM or kill -9, and go on where it was, bit for bit:
    python examples/train_stream.py --run-dir runs/stream-1 --resume
"""

from __future__ import annotations

import os

# Threads that spin while they wait slow down every other process of the machine; read when torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import webdataset as wds
from encoders import build_model, minilm_encoder
from evaluate import evaluate
from first_pass import PICTURES, number_pairs
from pairs import Pairs, decode, emoji_pairs, hold_out, leave_signals_to_parent
from PIL import Image
from run_folder import Metrics, StopSignal, load_checkpoint, open_run_dir, resumed_arguments, save_checkpoint
from torch import Tensor, nn
from tqdm import tqdm
from webdataset.shardlists import expand_urls

from protoclip_losses import (
    EpisodicClusterer,
    FeatureCollector,
    ProtoLoss,
    StreamEpisode,
    StreamEpisodes,
    StreamPass,
    TeacherAdapter,
)
from protoclip_losses.distributed import even_batches

log = logging.getLogger("train")
EXTRACTION, TRAINING = 0, 1  # passes over an episode; each draws its own augmentation
STAGES = ("extraction", "training")


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--shards", help="'x/{00000..00331}.tar', or what webdataset opens: URLs, 'pipe:...'; default: made from emoji"
    )
    p.add_argument("--val-data", help="pairs to evaluate on, as train_cc3m.py reads them; default: none, or held-out emoji")
    p.add_argument("--shards-per-episode", type=int, default=12)
    p.add_argument("--episodes", type=int, default=12, help="the first with InfoNCE only")
    p.add_argument("--num-prototypes", type=int, default=150)
    p.add_argument("--shuffle", type=int, default=512, help="samples that a reader holds, still encoded, and shuffles")
    p.add_argument("--readers", type=int, default=2, help="processes that read shards; they decide the order of samples")
    p.add_argument("--teacher", choices=("minilm", "none"), default="minilm")
    p.add_argument("--batch-size", type=int, default=128, help="of each process")
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--run-dir", type=Path, help="default: the next free runs/stream-NUMBER")
    p.add_argument("--resume", action="store_true", help="go on with the run in --run-dir; its arguments are read from there")
    p.add_argument("--save-every", type=int, default=20, help="batches between checkpoints, of either pass")
    p.add_argument("--log-every", type=int, default=5)
    p.set_defaults(method="stream")
    args = p.parse_args()
    return resumed_arguments(p, args.run_dir) if args.resume else args


def read_shard(shard: str) -> Iterator[dict[str, Any]]:
    """Raw samples in the order of the file. No splitting here: which process reads which shard is decided by the episode."""
    return iter(wds.DataPipeline(wds.SimpleShardList([shard]), wds.tarfile_to_samples()))


def caption_of(sample: dict[str, Any]) -> str:
    return " ".join(sample["txt"].decode("utf-8", errors="replace").split())


def decode_sample(sample: dict[str, Any], side: int) -> tuple[Tensor, str]:
    """Whatever this raises for leaves the sample out of both passes."""
    caption = caption_of(sample)
    if not caption:
        raise ValueError(f"{sample['__key__']} has no caption")
    return decode(next(sample[suffix] for suffix in PICTURES if suffix in sample), side), caption


def main() -> None:
    args = parse_arguments()
    rank, world_size, device = start_processes()
    run_dir = open_run_dir(args, rank, world_size)
    # LayerNorm heads hold no running statistics that ranks would have to agree on.
    model, inputs = build_model("small", args.seed, projection=128, hidden=512, norm="layer")
    model.to(device)
    ddp = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.2)

    # ---- the stream, the teacher and the loss -------------------------------------------------------------------------
    shards, held_out = find_shards(args, run_dir, inputs.decoded_side, rank)
    stream = StreamEpisodes(shards, args.shards_per_episode, seed=args.seed, episodes=args.episodes)
    teacher = None
    if args.teacher == "minilm":
        # Its PCA is fitted on the stream's first captions, kept in the run folder, and the same ever after.
        first = (sample for shard in stream.episode(0).shards for sample in read_shard(shard))
        captions = [caption_of(sample) for sample in islice(first, 2000) if "txt" in sample]
        teacher = TeacherAdapter.from_encoder(minilm_encoder(device), captions, cache=run_dir / "minilm.npy", dim=64)
    loss = ProtoLoss()
    clusterer = EpisodicClusterer(args.num_prototypes, seed=args.seed)

    # ---- where we are: all of it is in the checkpoint -----------------------------------------------------------------
    at: dict[str, Any] = {"stage": EXTRACTION, "step": 0, "ticks": 0, "saves": 0}
    position = stream.state_dict()  # this episode
    collector = FeatureCollector(dim=128)  # its features, of this rank
    only: Tensor | None = None  # its samples that have a prototype, of this rank; None: no prototypes, and all samples
    kept: dict[str, Any] | None = None  # how far the interrupted pass was
    metrics, stop = Metrics(run_dir, rank), StopSignal()
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "loss": loss, "clusterer": clusterer}
    if args.resume:
        loaded = load_checkpoint(run_dir, rank, world_size)
        if loaded is not None:
            shared, own = loaded
            at, only, kept = shared["at"], own["only"], own["pass"]
            stream.load_state_dict(shared["stream"])
            collector.load_state_dict(own["collector"])
            for name, part in stateful.items():
                part.load_state_dict(shared[name])
        metrics.cut_back(0 if loaded is None else loaded[0]["metrics_bytes"], at["step"])
        log.info("resuming after step %d, in %s", at["step"], STAGES[at["stage"]])

    def save(passing: StreamPass | None) -> None:
        at["saves"] += 1
        shared = {name: part.state_dict() for name, part in stateful.items()}
        shared |= {"at": at, "stream": position, "metrics_bytes": metrics.flush()}
        own = {"collector": collector.state_dict(), "only": only, "pass": None if passing is None else passing.state_dict()}
        save_checkpoint(run_dir, at["saves"], rank, world_size, shared, own)

    def batches(episode: StreamEpisode) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """(numbers, pictures, captions) of one pass, as long as every rank has some. Saves after each few; stops if asked to."""
        nonlocal kept
        passing = episode.batches(
            read_shard,
            partial(decode_sample, side=inputs.decoded_side),
            args.batch_size,
            workers=args.readers,
            rank=rank,
            world_size=world_size,
            shuffle=args.shuffle,
            only=only,
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        if kept is not None:
            passing.load_state_dict(kept)
            kept = None
        bar = tqdm(even_batches(passing), f"episode {episode.number + 1} {STAGES[at['stage']]}", leave=False, unit="batch")
        for index, (pictures, captions) in bar:
            yield index, inputs.augment(pictures.to(device), index, args.seed, episode.number, at["stage"]), captions
            at["ticks"] += 1
            stopping = stop.asked(at["ticks"], world_size, device)
            if stopping or at["ticks"] % args.save_every == 0:
                save(passing)
            if stopping:
                log.info("stopped and saved; go on with: python %s --run-dir %s --resume", sys.argv[0], run_dir)
                metrics.close()
                sys.exit(0)
        if passing.dropped:
            log.warning("%d of %d samples left out, as they do not decode", passing.dropped, passing.samples)

    # ---- the loop -----------------------------------------------------------------------------------------------------
    for episode in stream:
        position = {**stream.state_dict(), "number": episode.number}
        title, clock = f"episode {episode.number + 1}/{args.episodes}", time.time()

        # 1. First pass: features of the whole stretch, and the teacher's of its captions.
        if at["stage"] == EXTRACTION and episode.number > 0:
            model.eval()
            for index, pictures, captions in batches(episode):
                with torch.no_grad():
                    out = model(pictures, inputs.tokenize(captions).to(device))
                external = {} if teacher is None else {"minilm": teacher.encode(captions)}
                image, text = out["image_features_projected"], out["text_features_projected"]
                collector.update(index, image, text, teacher_features=external)
            log.info("%s: clustering %d samples of this rank into %d prototypes", title, len(collector), args.num_prototypes)
            clustering = time.time()
            loss.set_prototypes(clusterer.build(collector.bank(), collector.teachers()))
            only, collector = collector.index, FeatureCollector(dim=128)
            seconds = {"extraction_seconds": clustering - clock, "clustering_seconds": time.time() - clustering}
            metrics.log_scalars("episode", {**seconds, "samples": len(only)}, at["step"])
            assert clusterer.report is not None  # as it has just built
            metrics.log_scalars("clustering", clusterer.report.scalars(), at["step"])
        elif at["stage"] == EXTRACTION:
            loss.set_prototypes(None)
        if at["stage"] == EXTRACTION:
            at["stage"] = TRAINING
            save(None)

        # 2. Second pass: the same samples under the same numbers, in fresh augmentation.
        model.train()
        for index, pictures, captions in batches(episode):
            rate = args.learning_rate * min(1.0, (at["step"] + 1) / 40)
            for group in optimizer.param_groups:
                group["lr"] = rate
            out = ddp(pictures, inputs.tokenize(captions).to(device))
            parts = loss(**out, index=index.to(device), output_dict=True)
            total = sum(parts.values())
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            model.clamp_scales()
            at["step"] += 1
            if at["step"] % args.log_every == 0:
                metrics.write(at["step"], episode.number, rate, {"loss": total, **parts, **loss.metrics}, world_size)
        at["stage"], only = EXTRACTION, None
        log.info("%s: loss %.3f, %.1f s", title, metrics.last_loss, time.time() - clock)

    position = stream.state_dict()
    save(None)
    metrics.close()
    stop.forget()
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0 and held_out is not None:
        untrained, _ = build_model("small", args.seed, projection=128, hidden=512, norm="layer")
        for name, encoders in (("random encoder", untrained.to(device)), ("trained", model)):
            result, _, _ = evaluate(encoders, inputs, held_out, held_out, device, 0, name)
            print(f"{name:<16}", *(f"{key} {value:.3f}" for key, value in result.items()), sep="  ")


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1:
        # Long, because the others wait while the first one runs the teacher.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return rank, world_size, device


def find_shards(args: argparse.Namespace, run_dir: Path, side: int, rank: int) -> tuple[list[str], Pairs | None]:
    """Names of the shards, and the pairs to evaluate on. Without --shards, rank 0 writes the embedded emoji as shards of 100."""
    if args.shards is not None:
        shards = [str(shard) for shard in expand_urls(args.shards)]
        return shards, None if args.val_data is None else number_pairs(args.val_data, run_dir / "val_pairs.npz", side)
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
    return shards, replace(held_out, labels={})


if __name__ == "__main__":
    main()
