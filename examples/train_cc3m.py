"""Train ProtoCLIP, or the CLIP it is compared with, on image-text pairs. Read it from top to bottom.

The embedded pairs (emoji from pip packages) on two CPU cores, in under five minutes; then the same with plain CLIP, with
prototypes of the captions' words alone and from features that training has computed anyway, which costs next to nothing, and
with prototypes from a queue of recent features:
    python examples/train_cc3m.py
    python examples/train_cc3m.py --method clip
    python examples/train_cc3m.py --features training --weight-proto 0 --external-target-temperature 0.1
    python examples/train_cc3m.py --method online

Conceptual Captions as img2dataset writes it, an open_clip model, the paper's recipe (here on one GPU):
    bash examples/cc3m.sh one-gpu --train-data 'cc3m/{00000..00331}.tar' --run-dir runs/cc3m

Your own pairs, from a TSV of picture path and caption, or from a folder with a .txt file for each picture:
    python examples/train_cc3m.py --train-data pairs.tsv --val-data more_pairs.tsv
    python examples/train_cc3m.py --train-data folder/

Several processes, one per GPU or CPU core; the batch size is that of all of them together:
    torchrun --standalone --nproc-per-node 8 examples/train_cc3m.py --train-data 'cc3m/{00000..00331}.tar'

Stop it with Ctrl-C, SIGTERM or kill -9, and resume it, bit for bit:
    python examples/train_cc3m.py --run-dir runs/protoclip-1 --resume
"""

from __future__ import annotations

import os

# Read when torch starts its threads. Threads that spin while they wait cost nothing on an idle machine, and make each step
# several times slower on one that has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from arguments import parse_arguments, set_sizes
from augment import Inputs
from encoders import DualEncoder, build_model
from evaluate import report
from pairs import Pairs, load_batches
from processes import start_processes
from run_folder import STAGES, RunState, open_run_dir
from sources import GivenClusters, cluster_teachers, load_pairs, load_teachers
from torch import Tensor, nn
from tqdm import tqdm

from protoclip_losses import (
    Clustering,
    Episode,
    EpisodeSampler,
    EpisodicClusterer,
    FeatureBank,
    OnlinePrototypes,
    ProtoLoss,
    TeacherAdapter,
)

log = logging.getLogger("train")
Schedule = Literal["warmup", "prototypes", "lit"]


def main() -> None:
    args = parse_arguments(__doc__)
    rank, world_size, device = start_processes(args.device)
    run_dir = open_run_dir(args, rank, world_size)

    # ---- set up -----------------------------------------------------------------------------------------------------
    dtype = autocast_dtype(args.precision, device)
    torch.manual_seed(args.seed + rank)  # for dropout, if an open_clip model has any; nothing else draws from it
    model, inputs = new_model(args)
    model.to(device)
    pairs, held_out = load_pairs(args, run_dir, inputs.decoded_side, rank, world_size)
    set_sizes(args, len(pairs), world_size)
    teachers, given = ({}, {}) if args.method == "clip" else load_teachers(args, pairs, run_dir, device)
    sampler = EpisodeSampler(len(pairs), args.episode_size, seed=args.seed, episodes=args.episodes)
    loss, clusterer = new_loss(args), new_clusterer(args)
    is_clustered_once = args.method == "protoclip" and args.teacher_clusters == "whole"
    found = cluster_teachers(teachers, new_clusterer(args), run_dir, rank) if is_clustered_once else {}
    clusterings = {**found, **given}
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # ---- resume -----------------------------------------------------------------------------------------------------
    state = RunState(run_dir, rank, world_size, device, args.save_every)
    stateful = {"sampler": sampler, "model": model, "optimizer": optimizer, "scaler": scaler, "clusterer": clusterer}
    for name, obj in stateful.items():
        state.register(name, obj)
    state.register("loss", loss, per_rank=args.method == "online")  # where each rank has its own queue
    if given:
        state.register("given clusters", GivenClusters(given))
    if args.resume:
        state.load()
    sampler.number = state.progress.episode

    # ---- episodes ---------------------------------------------------------------------------------------------------
    trainer = Trainer(args, state, pairs, inputs, teachers, clusterings, model, loss, clusterer, optimizer, scaler, dtype)
    for episode in sampler:
        schedule = trainer.schedule(episode)
        if state.progress.stage == "extraction":
            if schedule == "prototypes" and args.method == "protoclip":
                bank = trainer.take_collected() if args.features == "training" else trainer.extract(episode)
                if bank is None:
                    log.info("%s: no features yet, without warm-up: InfoNCE only", trainer.title(episode))
                    loss.set_prototypes(None)
                else:
                    trainer.cluster(episode, bank)
            elif schedule == "lit" or args.method != "online":
                trainer.take_collected()
                loss.set_prototypes(None)  # InfoNCE only
            state.begin("training")
        trainer.train(episode, schedule)
        state.progress.next_episode()
    state.finish()

    # ---- report -----------------------------------------------------------------------------------------------------
    if rank == 0:
        encoders = {"random encoder": new_model(args)[0].to(device), f"trained, {args.method}": model}
        report(encoders, inputs, pairs, held_out, device, args.workers, run_dir)


@dataclass
class Trainer:
    """The stages of an episode, and what they work on."""

    args: argparse.Namespace
    state: RunState
    pairs: Pairs
    inputs: Inputs
    teachers: dict[str, TeacherAdapter]
    clusterings: dict[str, Clustering]  # of teachers that were clustered once
    model: DualEncoder
    loss: ProtoLoss
    clusterer: EpisodicClusterer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast; None for none
    collected: FeatureBank | None = None  # features of the last training pass

    def __post_init__(self) -> None:
        self.ddp: nn.Module = self.model
        if self.state.world_size > 1:
            gpu = [self.state.device] if self.state.device.type == "cuda" else None
            self.ddp = nn.parallel.DistributedDataParallel(self.model, gpu)

    def schedule(self, episode: Episode) -> Schedule:
        """The first episodes are warm-up and the last ones LiT, both with InfoNCE only; plain CLIP has no prototypes at all."""
        if episode.number >= self.args.episodes - self.args.lit_episodes:
            return "lit"
        is_warmup = self.args.method == "clip" or episode.number < self.args.warmup_episodes
        return "warmup" if is_warmup else "prototypes"

    def extract(self, episode: Episode) -> FeatureBank:
        """Projected features of this rank's samples: eval mode, no gradient, training augmentation."""
        index = episode.shard(self.state.rank, self.state.world_size)
        bank = FeatureBank(index, self.args.projection_width)
        self.state.register("bank", bank, per_rank=True)
        if self.state.world_size > 1:
            # DDP synchronises buffers in training only, and extraction has to see the same ones on every rank.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        start = time.time()
        # The same number of batches on every rank, although shards may differ by one sample: all ranks save together.
        order = list(torch.tensor_split(index, math.ceil(self.args.episode_size / self.args.batch_size)))
        for batch, pictures, tokens in self.batches(episode, order):
            with torch.no_grad(), self.autocast():
                out = self.model(pictures, tokens)
            bank.update(batch, out["image_features_projected"], out["text_features_projected"])
        self.state.unregister("bank")
        self.state.log_seconds("extraction", start)
        return bank

    def cluster(self, episode: Episode, bank: FeatureBank) -> None:
        """K-means of each modality and teacher that has no clustering yet, back-translation, and the constants of the terms."""
        internal = self.args.weight_proto > 0
        clustered = [*(["image", "text"] if internal else []), *(name for name in self.teachers if name not in self.clusterings)]
        if clustered:
            size, number = f"{self.args.episode_size:,}", f"{self.args.num_prototypes:,}"
            log.info("%s: clustering %s pairs into %s prototypes by %s", self.title(episode), size, number, ", ".join(clustered))
        start = time.time()
        # Features of the last episode's training serve the samples of this one.
        index = episode.index.to(bank.index.device) if self.args.features == "training" else None
        prototypes = self.clusterer.build(bank, {**self.teachers, **self.clusterings}, internal=internal, index=index)
        self.loss.set_prototypes(prototypes)
        log.info("%s: prototypes in %.1f s", self.title(episode), time.time() - start)
        self.state.log_seconds("clustering", start)
        metrics, step = self.state.metrics, self.state.progress.step
        metrics.log_scalars("clustering", prototypes.report.scalars(), step)
        if self.state.rank == 0:
            prototypes.report.plot(self.state.run_dir / "episode.png")

    def train(self, episode: Episode, schedule: Schedule) -> None:
        """One pass over the same samples, with new augmentation."""
        args, progress = self.args, self.state.progress
        self.model.train()
        start = time.time()
        index = episode.shard(self.state.rank, self.state.world_size)
        order = list(torch.split(index, args.batch_size // self.state.world_size))[: args.steps_per_episode]
        if args.method == "protoclip" and args.features == "training":
            self.collected = FeatureBank(torch.cat(order), args.projection_width)
            self.state.register("collected", self.collected, per_rank=True)
        for batch, pictures, tokens in self.batches(episode, order):
            rate = learning_rate(progress.step, args.episodes * args.steps_per_episode, args)
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0 if schedule == "lit" and group["visual"] else rate
            with self.autocast():
                out = self.ddp(pictures, tokens)
                parts = self.loss(**out, **self.label_arguments(batch), output_dict=True)
                total = sum(parts.values())
            if self.collected is not None:
                projected = (out[f"{name}_features_projected"].detach() for name in ("image", "text"))
                self.collected.update(batch, *projected)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), args.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.model.clamp_scales()
            progress.step += 1
            if progress.step % args.log_every == 0:
                scales = {"logit_scale": self.model.logit_scale.exp(), "logit_scale_proto": self.model.logit_scale_proto.exp()}
                values = {"loss": total, **parts, **self.loss.metrics, **scales}
                self.state.metrics.write(progress.step, episode.number, rate, values)
        self.state.log_seconds("training", start)
        used = "with prototypes" if schedule == "prototypes" else "InfoNCE only"
        log.info("%s: %s, loss %.3f, %.1f s", self.title(episode), used, self.state.metrics.last_loss, time.time() - start)

    def take_collected(self) -> FeatureBank | None:
        """The features of the last training pass, which no checkpoint needs any longer."""
        bank, self.collected = self.collected, None
        if bank is not None:
            self.state.unregister("collected")
        return bank

    def batches(self, episode: Episode, order: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(sample indices, augmented pictures, tokens) of each batch of this stage that is not done yet."""
        progress, device = self.state.progress, self.state.device
        done = progress.batches_done
        loader = load_batches(self.pairs, self.inputs.tokenize, order[done:], self.args.workers)
        bar = tqdm(loader, f"{self.title(episode)} {progress.stage}", len(order), initial=done, unit="batch", leave=False)
        phase = STAGES.index(progress.stage)
        for index, pictures, tokens in bar:
            # Outside autocast: colour jitter needs one dtype.
            augmented = self.inputs.augment(pictures.to(device), index, self.args.seed, episode.number, phase)
            yield index, augmented, tokens.to(device)
            self.state.batch_done()

    def label_arguments(self, index: Tensor) -> dict[str, Any]:
        """What gives a batch its labels: the sample index; in online mode the nearest centroid, so the teachers' features."""
        device, online = self.state.device, self.args.method == "online"
        wanted = self.teachers if online or self.args.weight_distill else {}
        features = {name: teacher[index].to(device) for name, teacher in wanted.items()}
        return {"index": None if online else index.to(device), "teacher_features": features}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.state.device.type, self.dtype, enabled=self.dtype is not None)

    def title(self, episode: Episode) -> str:
        return f"episode {episode.number + 1}/{self.args.episodes}"


def new_model(args: argparse.Namespace) -> tuple[DualEncoder, Inputs]:
    return build_model(args.model, args.seed, args.projection_width, args.head_width, args.head_norm)


def new_loss(args: argparse.Namespace) -> ProtoLoss:
    """The objective. In online mode its prototypes renew themselves as it is called."""
    loss = ProtoLoss(
        w_clip=args.weight_clip,
        w_proto=args.weight_proto,
        w_external=args.weight_external,
        w_distill=0.0 if args.method == "clip" or args.teacher == ["none"] else args.weight_distill,
        target_temperature=args.target_temperature,
        external_target_temperature=args.external_target_temperature,
    )
    if args.method == "online":
        # Warm-up lasts until the queue holds a sample per prototype.
        warmup = max(args.warmup_episodes * args.steps_per_episode, math.ceil(args.num_prototypes / args.batch_size))
        loss.set_prototypes(OnlinePrototypes(args.num_prototypes, args.queue_size, args.renew_every, warmup, seed=args.seed))
    return loss


def new_clusterer(args: argparse.Namespace) -> EpisodicClusterer:
    runs = {"niter": args.cluster_iterations, "nredo": args.cluster_restarts}
    return EpisodicClusterer(
        args.num_prototypes, labels_per_sample=args.labels_per_sample, **runs, seed=args.seed, device=args.cluster_device
    )


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The low precision of autocast; None for float32 throughout."""
    on_gpu = device.type == "cuda"
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if on_gpu else "fp32"
    if precision == "fp16" and not on_gpu:
        raise SystemExit("--precision must be fp32 or bf16 on a CPU, got fp16: it needs a GPU, where gradients are scaled")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def parameter_groups(model: DualEncoder, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for vectors, norms, scales and heads; `visual` marks the image encoder, which is locked in LiT episodes."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "head" not in name
            groups.setdefault((decays, name.startswith(("clip.visual", "image_head"))), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "visual": visual}
        for (decays, visual), parameters in groups.items()
    ]


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(args.warmup_steps, total_steps)
    if step < warmup:
        return float(args.learning_rate * (step + 1) / warmup)
    return float(args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))))


if __name__ == "__main__":
    main()
