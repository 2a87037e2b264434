"""The arguments of train_cc3m.py, and the defaults that depend on the data."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from run_folder import resumed_arguments

log = logging.getLogger("train")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The arguments of this start, or on resume those of the run."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = p.add_argument_group("data")
    data.add_argument("--train-data", help="tar shards 'x/{00000..00331}.tar', a .tsv, or a folder; default: embedded emoji")
    data.add_argument("--val-data", help="pairs to evaluate on, in the same forms; default: held-out training data")
    data.add_argument("--held-out", type=float, help="share of concepts to hold out; default: 0.2 of the emoji, 0.02 of files")
    data.add_argument("--workers", type=int, default=2, help="processes that decode pictures from files")
    method = p.add_argument_group("method")
    method.add_argument("--method", choices=("protoclip", "online", "clip"), default="protoclip")
    method.add_argument("--episodes", type=int, default=16)
    method.add_argument("--episode-size", type=int, help="pairs per episode; default: all training pairs, at most 200,000")
    method.add_argument("--warmup-episodes", type=int, default=1, help="first episodes, with InfoNCE only")
    method.add_argument("--lit-episodes", type=int, default=1, help="last episodes, with InfoNCE only and a locked image encoder")
    method.add_argument("--num-prototypes", type=int, help="K; default: one per 10 pairs of an episode")
    method.add_argument("--cluster-iterations", type=int, default=20, help="iterations of K-means")
    method.add_argument("--cluster-restarts", type=int, default=1, help="runs of K-means, of which the best is kept")
    method.add_argument("--cluster-device", default="cpu", help="device of K-means: cpu or cuda")
    method.add_argument("--queue-size", type=int, help="online: recent pairs that are clustered; default: 10 per prototype")
    method.add_argument("--renew-every", type=int, help="online: steps between updates of the prototypes; default: a full queue")
    method.add_argument("--target-temperature", type=float, default=0.01, help="of the soft targets; 0: hard targets")
    method.add_argument("--external-target-temperature", type=float, default=0.0, help="the same for the external teacher")
    method.add_argument("--weight-clip", type=float, default=1.0, help="weight of InfoNCE")
    method.add_argument("--weight-proto", type=float, default=1.0, help="weight of the image and text prototype terms")
    method.add_argument("--weight-external", type=float, default=1.0, help="weight of the external teacher's terms")
    method.add_argument("--weight-distill", type=float, default=0.0, help="weight of relational distillation of the teachers")
    teachers = "words (of the captions), minilm, .npy files with a row per training pair, or clusters of such rows, the folder "
    teachers += "or file of python -m protoclip_losses.cluster; one or several, or none"
    method.add_argument("--teacher", nargs="+", default=["words"], help=teachers)
    method.add_argument("--teacher-width", type=int, default=64, help="width of the teachers' features, by SVD or PCA")
    clustered = "cluster teachers once, over all training pairs, or in each episode"
    method.add_argument("--teacher-clusters", choices=("whole", "episode"), default="whole", help=clustered)
    method.add_argument("--labels-per-sample", type=int, default=1, help="the nearest clusters of a pair, as a mixture")
    made_of = "prototypes of a pass over the episode, or of what the last episode's training computed (--weight-proto 0)"
    method.add_argument("--features", choices=("extracted", "training"), default="extracted", help=made_of)
    model = p.add_argument_group("model and optimisation")
    model.add_argument("--model", default="small", help="small, or the name of an open_clip model")
    model.add_argument("--head-width", type=int, default=512, help="hidden width of the projection heads (paper: 2048)")
    model.add_argument("--head-norm", choices=("batch", "layer", "sync"), default="batch", help="norm of the projection heads")
    model.add_argument("--projection-width", type=int, default=128, help="width of the projected features")
    model.add_argument("--batch-size", type=int, default=128, help="pairs per step, over all processes")
    model.add_argument("--learning-rate", type=float, default=1e-3)
    model.add_argument("--warmup-steps", type=int, default=40, help="steps of linear warm-up of the learning rate")
    model.add_argument("--weight-decay", type=float, default=0.2)
    model.add_argument("--gradient-clip", type=float, default=10.0, help="largest norm of the gradient")
    model.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of autocast")
    model.add_argument("--device", default="auto", help="auto, cpu or cuda")
    model.add_argument("--seed", type=int, default=0)
    run = p.add_argument_group("run")
    run.add_argument("--run-dir", type=Path, help="default: the next free runs/METHOD-NUMBER")
    run.add_argument("--resume", action="store_true", help="resume the run in --run-dir; its arguments are read from there")
    run.add_argument("--save-every", type=int, default=50, help="batches between checkpoints, those of extraction included")
    run.add_argument("--log-every", type=int, default=5, help="training steps between lines of metrics.jsonl")
    args = p.parse_args()
    if args.resume:
        args = resumed_arguments(p, args.run_dir)
    counts = (
        "episodes",
        "episode_size",
        "num_prototypes",
        "batch_size",
        "save_every",
        "log_every",
        "teacher_width",
        "labels_per_sample",
    )
    for name in (*counts, "queue_size", "renew_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.held_out is not None and not 0 < args.held_out < 1:
        p.error(f"--held-out must be a share between 0 and 1, got {args.held_out}")
    if "none" in args.teacher and len(args.teacher) > 1:
        p.error(f"--teacher must be none or name teachers, got {' '.join(args.teacher)}")
    reuses = args.method == "protoclip" and args.features == "training"
    if reuses and (args.weight_proto > 0 or args.teacher_clusters == "episode" or args.teacher == ["none"]):
        p.error(
            "--features training needs teachers that are clustered once (--teacher-clusters whole), and --weight-proto 0: "
            "clusters of the features themselves need those of the pairs that are trained next"
        )
    return args


def set_sizes(args: argparse.Namespace, num_pairs: int, world_size: int) -> None:
    """Fill in the sizes that were not given, and check them all against the number of training pairs and of processes."""
    args.episode_size = args.episode_size or min(num_pairs, 200_000)
    args.num_prototypes = args.num_prototypes or max(1, args.episode_size // 10)
    args.queue_size = args.queue_size or 10 * args.num_prototypes
    args.renew_every = args.renew_every or max(1, args.queue_size // args.batch_size)
    args.steps_per_episode = args.episode_size // args.batch_size
    for name, is_right, wanted in (
        ("episode_size", args.episode_size <= num_pairs, f"at most the {num_pairs} training pairs"),
        ("num_prototypes", args.num_prototypes <= args.episode_size, f"at most the {args.episode_size} pairs of an episode"),
        ("labels_per_sample", args.labels_per_sample <= args.num_prototypes, f"at most the {args.num_prototypes} prototypes"),
        ("queue_size", args.queue_size >= args.num_prototypes, f"at least the {args.num_prototypes} prototypes"),
        ("batch_size", args.batch_size <= args.episode_size, f"at most the {args.episode_size} pairs of an episode"),
        ("batch_size", args.batch_size % world_size == 0, f"a multiple of the {world_size} processes"),
        ("batch_size", args.batch_size >= 2 * world_size, f"at least 2 for each of {world_size} processes"),
    ):
        if not is_right:
            raise SystemExit(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(args, name)}")
    if args.method != "clip" and args.warmup_episodes + args.lit_episodes >= args.episodes:
        log.warning("all %d episodes are warm-up or LiT: no prototype will be used", args.episodes)
