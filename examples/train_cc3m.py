"""Train ProtoCLIP, or the CLIP it is compared with, on image-text pairs. Read it from top to bottom.

The embedded pairs (emoji from pip packages) on two CPU cores, in under five minutes, then the same with plain CLIP, and
with prototypes from a queue of recent features instead of an extraction pass over each episode:
    python examples/train_cc3m.py
    python examples/train_cc3m.py --method clip
    python examples/train_cc3m.py --method online

Conceptual Captions as img2dataset writes it, an open_clip model, the paper's recipe for one GPU (also for more of them):
    bash examples/cc3m.sh one-gpu --train-data 'cc3m/{00000..00331}.tar' --run-dir runs/cc3m

Pairs of your own, from a TSV of picture path and caption, or from a folder with a .txt beside each picture:
    python examples/train_cc3m.py --train-data pairs.tsv --val-data more_pairs.tsv
    python examples/train_cc3m.py --train-data folder/

Several processes, one per GPU (or per core); the batch size is that of all of them together:
    torchrun --standalone --nproc-per-node 8 examples/train_cc3m.py --train-data 'cc3m/{00000..00331}.tar'

Stop it with Ctrl-C, SIGTERM or kill -9, and go on where it was, bit for bit:
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
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from encoders import DualEncoder, build_model
from evaluate import report
from pairs import load_batches
from run_folder import Metrics, StopSignal, load_checkpoint, open_run_dir, resumed_arguments, save_checkpoint
from sources import load_pairs, load_teacher
from torch import Tensor, nn
from tqdm import tqdm

from protoclip_losses import EpisodeSampler, EpisodicClusterer, FeatureBank, OnlinePrototypes, ProtoLoss

log = logging.getLogger("train")
EXTRACTION, TRAINING = 0, 1  # phases of an episode; each draws its own augmentation


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = p.add_argument_group("data")
    data.add_argument("--train-data", help="tar shards 'x/{00000..00331}.tar', a .tsv, or a folder; default: embedded emoji")
    data.add_argument("--val-data", help="pairs to evaluate on, likewise; default: a held-out share of the training data")
    data.add_argument("--held-out", type=float, help="share of concepts held out (0.2 of the emoji, 0.02 of files)")
    data.add_argument("--workers", type=int, default=2, help="processes that decode pictures from files")
    method = p.add_argument_group("method")
    method.add_argument("--method", choices=("protoclip", "online", "clip"), default="protoclip")
    method.add_argument("--episodes", type=int, default=16)
    method.add_argument("--episode-size", type=int, help="pairs per episode; default: all training pairs, at most 200,000")
    method.add_argument("--warmup-episodes", type=int, default=1, help="first episodes with InfoNCE only")
    method.add_argument("--lit-episodes", type=int, default=1, help="last episodes with InfoNCE only and a still image encoder")
    method.add_argument("--num-prototypes", type=int, help="K; default: one per 10 pairs of an episode")
    method.add_argument("--cluster-iterations", type=int, default=20)
    method.add_argument("--cluster-restarts", type=int, default=1, help="K-means runs, the best of which is kept")
    method.add_argument("--cluster-device", default="cpu", help="where K-means runs: cpu or cuda")
    method.add_argument("--queue-size", type=int, help="online: recent pairs that are clustered; default: 10 per prototype")
    method.add_argument("--renew-every", type=int, help="online: steps between prototypes; default: those that fill the queue")
    method.add_argument("--target-temperature", type=float, default=0.01, help="of soft targets; 0 or less: hard targets")
    method.add_argument("--external-target-temperature", type=float, default=0.0, help="the same of the teacher's terms")
    method.add_argument("--weight-clip", type=float, default=1.0)
    method.add_argument("--weight-proto", type=float, default=1.0)
    method.add_argument("--weight-external", type=float, default=1.0)
    method.add_argument("--teacher", default="minilm", help="minilm, none, or a .npy file with a row per training pair")
    method.add_argument("--teacher-width", type=int, default=64, help="width of the teacher's features after PCA")
    model = p.add_argument_group("model and optimisation")
    model.add_argument("--model", default="small", help="small, or the name of any open_clip model")
    model.add_argument("--head-width", type=int, default=512, help="hidden width of the projection heads (paper: 2048)")
    model.add_argument("--head-norm", choices=("batch", "layer", "sync"), default="batch")
    model.add_argument("--projection-width", type=int, default=128)
    model.add_argument("--batch-size", type=int, default=128, help="pairs per step, over all processes")
    model.add_argument("--learning-rate", type=float, default=1e-3)
    model.add_argument("--warmup-steps", type=int, default=40)
    model.add_argument("--weight-decay", type=float, default=0.2)
    model.add_argument("--gradient-clip", type=float, default=10.0)
    model.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    model.add_argument("--device", default="auto", help="auto, cpu or cuda")
    model.add_argument("--seed", type=int, default=0)
    run = p.add_argument_group("run")
    run.add_argument("--run-dir", type=Path, help="default: the next free runs/METHOD-NUMBER")
    run.add_argument("--resume", action="store_true", help="go on with the run in --run-dir; its arguments are read from there")
    run.add_argument("--save-every", type=int, default=50, help="steps between checkpoints, extraction batches included")
    run.add_argument("--log-every", type=int, default=5, help="training steps between lines of metrics.jsonl")
    args = p.parse_args()
    if args.resume:
        args = resumed_arguments(p, args.run_dir)
    counts = ("episodes", "episode_size", "num_prototypes", "batch_size", "save_every", "log_every", "teacher_width")
    for name in (*counts, "queue_size", "renew_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.held_out is not None and not 0 < args.held_out < 1:
        p.error(f"--held-out must be a share between 0 and 1, got {args.held_out}")
    return args


def main() -> None:
    args = parse_arguments()

    # ---- processes, device, run folder ------------------------------------------------------------------------------
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        # Long, because the other processes wait while the first one numbers the pairs and runs the teacher.
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(hours=12))
    run_dir = open_run_dir(args, rank, world_size)
    precision = args.precision
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if use_cuda else "fp32"
    if precision == "fp16" and not use_cuda:
        raise SystemExit("--precision fp16 needs a GPU (its gradients are scaled there); a CPU has fp32 and bf16")

    # ---- model, data, teacher ---------------------------------------------------------------------------------------
    def new_model() -> Any:
        return build_model(args.model, args.seed, args.projection_width, args.head_width, args.head_norm)

    # Nothing below draws from this generator but dropout, if an open_clip model has any; it is saved and restored.
    torch.manual_seed(args.seed + rank)
    model, inputs = new_model()
    model.to(device)
    train, held_out = load_pairs(args, run_dir, inputs.decoded_side, rank, world_size)
    episode_size = args.episode_size or min(len(train), 200_000)
    num_prototypes = args.num_prototypes or max(1, episode_size // 10)
    queue_size = args.queue_size or 10 * num_prototypes
    steps_per_episode = episode_size // args.batch_size
    for wrong, message in (
        (episode_size > len(train), f"--episode-size {episode_size} is more than the {len(train)} training pairs"),
        (num_prototypes > episode_size, f"--num-prototypes {num_prototypes} is more than the {episode_size} pairs of an episode"),
        (queue_size < num_prototypes, f"--queue-size {queue_size} is less than the {num_prototypes} prototypes"),
        (steps_per_episode < 1, f"--batch-size {args.batch_size} is more than the {episode_size} pairs of an episode"),
        (args.batch_size % world_size > 0, f"--batch-size {args.batch_size} does not divide over {world_size} processes"),
        (
            args.batch_size < 2 * world_size,
            f"--batch-size {args.batch_size} is less than 2 pairs for each of {world_size} processes",
        ),
    ):
        if wrong:
            raise SystemExit(message)
    own_batch = args.batch_size // world_size
    clip_only, online = args.method == "clip", args.method == "online"
    teachers = {} if clip_only else load_teacher(args, train, run_dir, device)

    # ---- loss, clustering, optimiser --------------------------------------------------------------------------------
    loss = ProtoLoss(
        w_clip=args.weight_clip,
        w_proto=args.weight_proto,
        w_external=args.weight_external,
        target_temperature=args.target_temperature,
        external_target_temperature=args.external_target_temperature,
    )
    clusterer = EpisodicClusterer(
        num_prototypes, niter=args.cluster_iterations, nredo=args.cluster_restarts, seed=args.seed, device=args.cluster_device
    )
    sampler = EpisodeSampler(len(train), episode_size, seed=args.seed, episodes=args.episodes)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    ddp = nn.parallel.DistributedDataParallel(model, [device] if use_cuda else None) if world_size > 1 else model

    # ---- where we are: all of it is in the checkpoint ---------------------------------------------------------------
    # `done` counts the finished batches of `stage`, `ticks` all batches ever, `step` the optimiser's steps.
    at: dict[str, Any] = {"stage": "extraction", "done": 0, "ticks": 0, "step": 0, "saves": 0, "pairs": len(train)}
    bank: FeatureBank | None = None
    kept_bank: dict[str, Any] | None = None
    sampler_state = sampler.state_dict()
    metrics = Metrics(run_dir, rank)
    loaded = load_checkpoint(run_dir, rank, world_size) if args.resume else None
    if loaded is not None:
        shared, own_state = loaded
        at, sampler_state, kept_bank = shared["at"], shared["sampler"], own_state["bank"]
        if at["pairs"] != len(train):
            raise SystemExit(f"--resume: the run has {at['pairs']} training pairs and --train-data now gives {len(train)}")
        model.load_state_dict(shared["model"])
        optimizer.load_state_dict(shared["optimizer"])
        scaler.load_state_dict(shared["scaler"])
        loss.load_state_dict((own_state if online else shared)["loss"])
        clusterer.load_state_dict(shared["clusterer"])
        torch.set_rng_state(own_state["rng"])
        if use_cuda:
            torch.cuda.set_rng_state(own_state["cuda_rng"])
    if args.resume:
        metrics.cut_back(0 if loaded is None else loaded[0]["metrics_bytes"], at["step"])
        log.info("resuming after step %d, in %s", at["step"], at["stage"])
    sampler.load_state_dict(sampler_state)

    stop = StopSignal()
    if not clip_only and args.warmup_episodes + args.lit_episodes >= args.episodes:
        log.warning("all %d episodes are warm-up or LiT: no prototype will be used", args.episodes)

    def save() -> None:
        at["saves"] += 1
        shared = {
            "at": at,
            "sampler": sampler_state,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "clusterer": clusterer.state_dict(),
            "metrics_bytes": metrics.flush(),
        }
        own = {
            "bank": bank.state_dict() if bank is not None and at["stage"] == "extraction" else None,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if use_cuda else None,
        }
        (own if online else shared)["loss"] = loss.state_dict()  # each rank has a queue of its own
        save_checkpoint(run_dir, at["saves"], rank, world_size, shared, own)

    def batch_done() -> None:
        """After each batch of either stage: save if it is time to, and stop if somebody asked."""
        at["done"] += 1
        at["ticks"] += 1
        stopping = stop.asked(at["ticks"], world_size, device)
        if stopping or at["ticks"] % args.save_every == 0:
            save()
        if stopping:
            log.info("stopped and saved; go on with: python %s --run-dir %s --resume", sys.argv[0], run_dir)
            metrics.close()
            sys.exit(0)

    # ---- the loop ---------------------------------------------------------------------------------------------------
    for episode in sampler:
        sampler_state = {**sampler.state_dict(), "number": episode.number}
        own = episode.shard(rank, world_size)
        still = episode.number >= args.episodes - args.lit_episodes
        contrastive = clip_only or still or episode.number < args.warmup_episodes
        title = f"episode {episode.number + 1}/{args.episodes}"
        clock = time.time()

        if at["stage"] == "extraction" and (contrastive or online):
            at["stage"] = "training"
            if still or not online:
                loss.set_prototypes(None)
            elif episode.number == 0:
                # From here on the loss does it all: the queue, the first K-means after warm-up, and new prototypes as it goes.
                every = args.renew_every or max(1, queue_size // args.batch_size)
                warmup = max(args.warmup_episodes * steps_per_episode, math.ceil(num_prototypes / args.batch_size))
                loss.set_prototypes(OnlinePrototypes(num_prototypes, queue_size, every, warmup, seed=args.seed))
        elif at["stage"] == "extraction":
            # 1. Features of the whole episode: eval mode, no gradient, training augmentation.
            bank = FeatureBank(own, args.projection_width)
            if kept_bank is not None:
                bank.load_state_dict(kept_bank)
                kept_bank = None
            if world_size > 1:
                # DDP brings a module's buffers into line in training only; extraction must see the same ones everywhere.
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            model.eval()
            # As many batches on every rank, although shards may differ by one row: all ranks save together.
            order = list(torch.tensor_split(own, math.ceil(episode_size / args.batch_size)))
            batches = load_batches(train, inputs.tokenize, order[at["done"] :], args.workers)
            for index, pictures, tokens in bar(batches, f"{title} extraction", order, at["done"]):
                with torch.no_grad(), torch.autocast(device.type, low, enabled=low is not None):
                    crops = inputs.augment(pictures.to(device), index, args.seed, episode.number, EXTRACTION)
                    out = model(crops, tokens.to(device))
                bank.update(index, out["image_features_projected"], out["text_features_projected"])
                batch_done()
            # 2. K-means of each modality and of the teacher, back translation; 3. the terms' constants.
            names = ", ".join(["image", "text", *teachers])
            log.info("%s: clustering %s pairs into %s prototypes by %s", title, f"{episode_size:,}", f"{num_prototypes:,}", names)
            clustering = time.time()
            loss.set_prototypes(clusterer.build(bank, teachers))
            log.info("%s: clustered in %.1f s", title, time.time() - clustering)
            seconds = {"extraction_seconds": clustering - clock, "clustering_seconds": time.time() - clustering}
            metrics.log_scalars("episode", seconds, at["step"])
            assert clusterer.report is not None  # as it has just built
            metrics.log_scalars("clustering", clusterer.report.scalars(), at["step"])
            bank = None
            at["stage"], at["done"] = "training", 0
            save()

        # 4. One pass over the same episode, with fresh augmentation.
        training = time.time()
        model.train()
        order = list(torch.split(own, own_batch))[:steps_per_episode]
        batches = load_batches(train, inputs.tokenize, order[at["done"] :], args.workers)
        for index, pictures, tokens in bar(batches, f"{title} training", order, at["done"]):
            rate = learning_rate(at["step"], args.episodes * steps_per_episode, args)
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if still and group["visual"] else rate
            with torch.autocast(device.type, low, enabled=low is not None):
                crops = inputs.augment(pictures.to(device), index, args.seed, episode.number, TRAINING)
                labels: dict[str, Any] = {"index": index.to(device)}
                if online:  # a label is the centroid nearest to the feature itself, the teacher's too
                    labels = {"teacher_features": {name: teacher[index].to(device) for name, teacher in teachers.items()}}
                parts = loss(**ddp(crops, tokens.to(device)), **labels, output_dict=True)
                total = sum(parts.values())
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(total).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.gradient_clip)
            scaler.step(optimizer)
            scaler.update()
            model.clamp_scales()
            at["step"] += 1
            if at["step"] % args.log_every == 0:
                scales = {"logit_scale": model.logit_scale.exp(), "logit_scale_proto": model.logit_scale_proto.exp()}
                values = {"loss": total, **parts, **loss.metrics, **scales}
                metrics.write(at["step"], episode.number, rate, values, world_size)
            batch_done()
        at["stage"], at["done"] = "extraction", 0
        metrics.log_scalars("episode", {"training_seconds": time.time() - training}, at["step"])
        kind = "InfoNCE only" if contrastive else "with prototypes"
        log.info("%s: %s, loss %.3f, %.1f s", title, kind, metrics.last_loss, time.time() - clock)

    sampler_state = sampler.state_dict()
    save()
    metrics.close()
    stop.forget()
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        encoders = {"random encoder": new_model()[0].to(device), f"trained, {args.method}": model}
        report(encoders, inputs, train, held_out, device, args.workers, run_dir)


def parameter_groups(model: DualEncoder, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for vectors, norms, scales and heads; `visual` marks what stands still in LiT episodes."""
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


def bar(batches: Iterable[Any], title: str, order: list[Tensor], done: int) -> Iterable[Any]:
    """A progress bar with rate and time left, in batches of this process."""
    shown: Iterable[Any] = tqdm(batches, desc=title, total=len(order), initial=done, unit="batch", leave=False)
    return shown


if __name__ == "__main__":
    main()
