"""Train ProtoCLIP on a stream: WebDataset shards, read from their beginning, without numbering pairs first.

Shards made from the embedded pairs (emoji from pip packages), on two CPU cores:
    python examples/train_stream.py

Your own shards, evaluated on your own pairs. An episode is a stretch of 20 shards; memory grows with its size alone:
    python examples/train_stream.py --shards 'cc3m/{00000..00329}.tar' --shards-per-episode 20 --num-prototypes 20000 \
        --shuffle 5000 --readers 8 --val-data val_pairs.tsv

Several processes, each of which reads whole shards:
    torchrun --standalone --nproc-per-node 2 examples/train_stream.py

Stop it with Ctrl-C, SIGTERM or kill -9, and resume it, bit for bit:
    python examples/train_stream.py --run-dir runs/stream-1 --resume
"""

from __future__ import annotations

import os

# Threads that spin while they wait slow down every other process of the machine; read when torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from augment import Inputs
from captions import CAPTION_BYTES, SampleError, read_caption
from encoders import DualEncoder, build_model, minilm_encoder
from evaluate import evaluate
from pairs import decode, leave_signals_to_parent
from processes import start_processes
from run_folder import STAGES, RunState, open_run_dir, resumed_arguments
from shards import group_samples, members, picture_and_text
from sources import find_shards
from torch import Tensor, nn
from tqdm import tqdm
from webdataset.gopen import gopen

from protoclip_losses import (
    EpisodicClusterer,
    FeatureCollector,
    ProtoLoss,
    Prototypes,
    StreamEpisode,
    StreamEpisodes,
    TeacherAdapter,
)
from protoclip_losses.distributed import active_group, even_batches, gather_sizes

log = logging.getLogger("train")


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shards", help="'x/{00000..00331}.tar', or what webdataset opens: URLs, 'pipe:...'; default: from emoji")
    p.add_argument("--val-data", help="pairs to evaluate on, as train_cc3m.py reads them; default: none, or held-out emoji")
    p.add_argument("--shards-per-episode", type=int, default=12)
    p.add_argument("--episodes", type=int, default=12, help="episodes, the first of which is warm-up with InfoNCE only")
    p.add_argument("--num-prototypes", type=int, default=150)
    p.add_argument("--shuffle", type=int, default=512, help="encoded samples that a reader holds and shuffles")
    p.add_argument("--readers", type=int, default=2, help="processes that read shards; the order of samples depends on them")
    p.add_argument("--teacher", choices=("words", "minilm", "none"), default="words")
    p.add_argument("--batch-size", type=int, default=128, help="samples per step, of each process")
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--run-dir", type=Path, help="default: the next free runs/stream-NUMBER")
    p.add_argument("--resume", action="store_true", help="resume the run in --run-dir; its arguments are read from there")
    p.add_argument("--save-every", type=int, default=20, help="batches between checkpoints, those of extraction included")
    p.add_argument("--log-every", type=int, default=5, help="training steps between lines of metrics.jsonl")
    p.set_defaults(method="stream")
    args = p.parse_args()
    return resumed_arguments(p, args.run_dir, commands=["shards"]) if args.resume else args


def read_shard(shard: str) -> Iterator[dict[str, Any]]:
    """Raw samples in the order of the file. No splitting here: the episode decides which process reads which shard."""
    stream = gopen(shard)
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for sample in group_samples((info.name, read_member(tar, info)) for info in members(tar)):
                yield {"__url__": shard, **sample}
    except tarfile.TarError as error:
        raise tarfile.TarError(f"{shard}: {error}") from error
    finally:
        with suppress(OSError):  # of a command that was not done yet
            stream.close()


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | None:
    """The bytes of a member; None for a text that is too long for a caption."""
    if info.name.lower().endswith(".txt") and info.size > CAPTION_BYTES:
        return None
    file = tar.extractfile(info)
    return None if file is None else file.read()


def decode_sample(sample: dict[str, Any], side: int) -> tuple[Tensor, str]:
    """(picture, caption). A sample for which this raises is left out of both passes."""
    picture, text = picture_and_text(sample)
    return decode(picture, side), read_caption(text)


def main() -> None:
    args = parse_arguments()
    rank, world_size, device = start_processes()
    run_dir = open_run_dir(args, rank, world_size)

    # ---- set up -----------------------------------------------------------------------------------------------------
    model, inputs = new_model(args)
    model.to(device)
    shards, held_out = find_shards(args, run_dir, inputs.decoded_side, rank)
    stream = StreamEpisodes(shards, args.shards_per_episode, seed=args.seed, episodes=args.episodes)
    teacher = load_teacher(args, stream, run_dir, device)
    loss, clusterer = ProtoLoss(), EpisodicClusterer(args.num_prototypes, seed=args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.2)

    # ---- resume -----------------------------------------------------------------------------------------------------
    state = RunState(run_dir, rank, world_size, device, args.save_every)
    stateful = {"stream": stream, "model": model, "optimizer": optimizer, "loss": loss, "clusterer": clusterer}
    for name, obj in stateful.items():
        state.register(name, obj)
    if args.resume:
        state.load()
    stream.number = state.progress.episode

    # ---- episodes ---------------------------------------------------------------------------------------------------
    trainer = Trainer(args, state, inputs, teacher, model, loss, clusterer, optimizer)
    for episode in stream:
        if state.progress.stage == "extraction":
            if episode.number > 0:
                trainer.cluster(episode, trainer.extract(episode))
            else:
                loss.set_prototypes(None)  # warm-up: InfoNCE only
            state.begin("training")
        trainer.train(episode)
        state.progress.next_episode()
    state.finish()

    # ---- report -----------------------------------------------------------------------------------------------------
    if rank == 0 and held_out is not None:
        for name, encoders in (("random encoder", new_model(args)[0].to(device)), ("trained", model)):
            result, _, _ = evaluate(encoders, inputs, held_out, held_out, device, 0, name)
            print(f"{name:<16}", *(f"{key} {value:.3f}" for key, value in result.items()), sep="  ")


@dataclass
class Trainer:
    """The stages of an episode, and what they work on."""

    args: argparse.Namespace
    state: RunState
    inputs: Inputs
    teacher: TeacherAdapter | None
    model: DualEncoder
    loss: ProtoLoss
    clusterer: EpisodicClusterer
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        several = self.state.world_size > 1
        self.ddp: nn.Module = nn.parallel.DistributedDataParallel(self.model) if several else self.model

    def extract(self, episode: StreamEpisode) -> FeatureCollector:
        """First pass: projected features of this rank's samples, and the teacher's features of their captions."""
        collector = FeatureCollector(dim=128)
        self.state.register("collector", collector, per_rank=True)
        self.model.eval()
        start = time.time()
        for index, pictures, captions in self.batches(episode, only=None):
            with torch.no_grad():
                out = self.model(pictures, self.inputs.tokenize(captions).to(self.state.device))
            external = {} if self.teacher is None else {self.args.teacher: self.teacher.encode(captions)}
            image, text = out["image_features_projected"], out["text_features_projected"]
            collector.update(index, image, text, teacher_features=external)
        self.state.unregister("collector")
        self.state.log_seconds("extraction", start)
        return collector

    def cluster(self, episode: StreamEpisode, collector: FeatureCollector) -> None:
        """K-means of each modality and of the teacher, back-translation, and the constants of the prototype terms."""
        number = self.args.num_prototypes
        samples = gather_sizes(len(collector), active_group(None))
        if min(samples) == 0 or sum(samples) < number:
            wanted = f"{number} samples for --num-prototypes, at least one of them on each process"
            log.warning(
                "%s: InfoNCE only; there must be %s, got %s: %s",
                self.title(episode),
                wanted,
                samples,
                self.sizes(episode, collector),
            )
            self.loss.set_prototypes(None)
            return
        log.info("%s: clustering %d samples of this rank into %d prototypes", self.title(episode), len(collector), number)
        start = time.time()
        prototypes = self.clusterer.build(collector.bank(), collector.teachers())
        self.loss.set_prototypes(prototypes)
        self.state.log_seconds("clustering", start)
        metrics, step = self.state.metrics, self.state.progress.step
        metrics.log_scalars("episode", {"samples": len(collector)}, step)
        metrics.log_scalars("clustering", prototypes.report.scalars(), step)

    def train(self, episode: StreamEpisode) -> None:
        """Second pass: the same samples under the same indices, with new augmentation."""
        args, progress = self.args, self.state.progress
        prototypes = self.loss.prototypes
        only = prototypes.index if isinstance(prototypes, Prototypes) else None  # those that have a label
        self.model.train()
        start = time.time()
        for index, pictures, captions in self.batches(episode, only):
            rate = args.learning_rate * min(1.0, (progress.step + 1) / 40)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            out = self.ddp(pictures, self.inputs.tokenize(captions).to(self.state.device))
            parts = self.loss(**out, index=index.to(self.state.device), output_dict=True)
            total = sum(parts.values())
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            self.optimizer.step()
            self.model.clamp_scales()
            progress.step += 1
            if progress.step % args.log_every == 0:
                values = {"loss": total, **parts, **self.loss.metrics}
                self.state.metrics.write(progress.step, episode.number, rate, values)
        self.state.log_seconds("training", start)
        log.info("%s: loss %.3f, %.1f s", self.title(episode), self.state.metrics.last_loss, time.time() - start)

    def batches(self, episode: StreamEpisode, only: Tensor | None) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """(sample indices, augmented pictures, captions) of the rest of a pass, for as long as every rank has a batch."""
        args, stage = self.args, self.state.progress.stage
        stream_pass = episode.batches(
            read_shard,
            partial(decode_sample, side=self.inputs.decoded_side),
            args.batch_size,
            num_workers=args.readers,
            rank=self.state.rank,
            world_size=self.state.world_size,
            shuffle_buffer=args.shuffle,
            only=only,
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        self.state.register("pass", stream_pass, per_rank=True)
        bar = tqdm(even_batches(stream_pass), f"episode {episode.number + 1} {stage}", leave=False, unit="batch")
        for index, (pictures, captions) in bar:
            pictures = pictures.to(self.state.device)
            yield index, self.inputs.augment(pictures, index, args.seed, episode.number, STAGES.index(stage)), captions
            self.state.batch_done()
        self.state.unregister("pass")
        if stream_pass.dropped:
            log.warning("%d of %d samples left out, as they do not decode", stream_pass.dropped, stream_pass.samples)

    def sizes(self, episode: StreamEpisode, collector: FeatureCollector) -> str:
        """How many samples came from each of this rank's shards, the smallest first."""
        counts = torch.bincount(collector.index.cpu() >> 32, minlength=len(episode.shards)).tolist()
        own = sorted(range(self.state.rank, len(counts), self.state.world_size), key=counts.__getitem__)
        return ", ".join(f"{counts[i]} in {episode.shards[i]}" for i in own[:5]) + (", ..." if len(own) > 5 else "")

    def title(self, episode: StreamEpisode) -> str:
        return f"episode {episode.number + 1}/{self.args.episodes}"


def new_model(args: argparse.Namespace) -> tuple[DualEncoder, Inputs]:
    # LayerNorm heads have no running statistics that ranks would have to synchronise.
    return build_model("small", args.seed, projection=128, hidden=512, norm="layer")


def load_teacher(args: argparse.Namespace, stream: StreamEpisodes, run_dir: Path, device: torch.device) -> TeacherAdapter | None:
    """The external teacher. It is fitted once, on the first captions of the stream, and kept in the run folder."""
    if args.teacher == "none":
        return None
    captions = list(islice(read_captions([*stream.episode(0).shards, *stream.shards]), 2000))
    if not captions:
        raise SystemExit(f"--shards must have captions, got none in {len(stream.shards)} shards from {stream.shards[0]} on")
    if args.teacher == "words":
        return TeacherAdapter.from_captions(captions, 64, run_dir / "words.npy")
    width = min(64, len(captions))
    return TeacherAdapter.from_encoder(minilm_encoder(device), captions, cache=run_dir / "minilm.npy", dim=width)


def read_captions(shards: list[str]) -> Iterator[str]:
    """The captions of shards, each shard once."""
    for shard in dict.fromkeys(shards):
        for sample in read_shard(shard):
            with suppress(SampleError):
                yield read_caption(picture_and_text(sample)[1])


if __name__ == "__main__":
    main()
