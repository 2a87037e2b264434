"""The launcher's own arguments, which start with ``--proto-``; all others are open_clip's."""

import argparse
from collections.abc import Sequence

from ..._checks import require
from .teachers import WORDS


def _teacher(text: str) -> tuple[str, str | None]:
    """Its name and its file or folder; there is none of the captions' own words."""
    if text == WORDS:
        return text, None
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be {WORDS}, NAME=FILE.npy or NAME=CLUSTERS, got {text!r}")
    return name, file


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The ``--proto-`` arguments, and the rest, which is open_clip's."""
    p = argparse.ArgumentParser(
        "python -m protoclip_losses.integrations.open_clip",
        description="open_clip_train.main with ProtoLoss instead of its own loss. All other arguments are those of open_clip.",
        allow_abbrev=False,
    )
    p.add_argument("--proto-weight", type=float, default=1.0, help="of the prototype terms; 0: the run of open_clip, bit for bit")
    p.add_argument("--proto-weight-external", type=float, default=1.0, help="of external teachers")
    p.add_argument("--proto-num-prototypes", type=int, help="K; default: one per 10 samples of an epoch, online at most 20,000")
    p.add_argument("--proto-target-temperature", type=float, default=0.01, help="of soft targets; 0: hard targets")
    p.add_argument("--proto-warmup-epochs", type=int, default=1, help="first epochs without prototypes")
    p.add_argument("--proto-head-dim", type=int, default=128)
    p.add_argument("--proto-head-hidden-dim", type=int, default=2048)
    p.add_argument("--proto-head-norm", choices=("batch", "layer", "sync"), default="batch")
    p.add_argument("--proto-niter", type=int, default=20, help="K-means iterations")
    p.add_argument("--proto-nredo", type=int, default=1, help="K-means runs, the best of which is kept (paper: 3)")
    p.add_argument(
        "--proto-teacher",
        action="append",
        type=_teacher,
        metavar=f"{WORDS} | NAME=FILE.npy | NAME=CLUSTERS",
        help=f"{WORDS}: those of the csv's captions; or a file with a row per row of the csv; or what python -m "
        "protoclip_losses.cluster wrote of such rows; may be given several times",
    )
    p.add_argument("--proto-teacher-dim", type=int, default=64, help="width of teachers, by SVD or PCA")
    p.add_argument("--proto-keep-loss", action="store_true", help="open_clip's own loss computes the contrastive part")
    p.add_argument(
        "--proto-no-gather-with-grad",
        action="store_true",
        help="contrastive gradients as open_clip's default has them, 1/W of the true ones on W processes",
    )
    p.add_argument("--proto-online", action="store_true", help="prototypes from a queue of recent features, no episodes")
    p.add_argument("--proto-queue-size", type=int, help="online: samples kept, of all processes; default: 10 per prototype")
    p.add_argument("--proto-every", type=int, help="online: steps from one set of prototypes to the next; default: a queue's")
    p.add_argument("--proto-warmup-steps", type=int, help="online: default those of --proto-warmup-epochs")
    options, rest = p.parse_known_args(argv)
    if unknown := [name for name in rest if name.startswith("--proto")]:
        p.error(f"unknown arguments: {' '.join(unknown)}")
    names = [name for name, _ in options.proto_teacher or ()]
    if len(set(names)) < len(names):
        p.error(f"--proto-teacher must name each teacher once, got {' '.join(names)}")
    args = require("open_clip_train.params", "open-clip").parse_args(rest)
    for refused in ("horovod", "trace", "torchscript"):
        if getattr(args, refused):
            p.error(f"--{refused.replace('_', '-')} cannot be combined with ProtoLoss")
    if "coca" in args.model.lower():  # open_clip's own question
        p.error(f"--model must be a CLIP, got {args.model}: CoCa, which also captions, cannot be combined with ProtoLoss")
    return options, rest
