"""open_clip 3.3: its own trainer with ProtoLoss in place of its loss.

    python -m protoclip_losses.integrations.open_clip --proto-num-prototypes 20000 ARGUMENTS OF open_clip_train.main

An epoch of open_clip is an episode: before it, one pass over the epoch's samples in eval mode, K-means and back translation.
open_clip's package is not changed; four functions that its ``main`` calls are replaced while it runs.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..clustering import EpisodicClusterer, Prototypes
from ..losses import ProtoLoss
from ..teachers import TeacherAdapter
from . import require
from .extraction import extract
from .open_clip_data import number_samples
from .open_clip_model import OpenClipLoss, add_heads

__all__ = ["Launcher", "OpenClipLoss", "add_heads", "main", "parse_arguments"]


class Launcher:
    """What takes the place of four functions of ``open_clip_train.main``, each of which calls the original.

    Args:
        options: the ``--proto-`` arguments, as :func:`parse_arguments` returns them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.host = require("open_clip_train.main", "open-clip")
        names = ("create_model_and_transforms", "get_data", "create_loss", "train_one_epoch")
        self.original = {name: getattr(self.host, name) for name in names}
        given = options.proto_teacher or ()
        self.teachers = {name: TeacherAdapter.from_file(file, options.proto_teacher_dim) for name, file in given}
        self.has_terms = options.proto_weight > 0 or (bool(self.teachers) and options.proto_weight_external > 0)

    def create_model_and_transforms(self, *args: Any, **kwargs: Any) -> Any:
        """The model with heads."""
        model, *transforms = self.original["create_model_and_transforms"](*args, **kwargs)
        o = self.options
        add_heads(model, o.proto_head_dim, o.proto_head_hidden_dim, o.proto_head_norm)
        # Without terms not even their zeros: one more zero in the norm of all gradients can change its rounding.
        model.proto.requires_grad_(self.has_terms)
        return model, *transforms

    def get_data(self, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """The data, with an index per training sample if there will be prototypes."""
        data = self.original["get_data"](args, *rest, **kwargs)
        if "train" in data and self.has_terms:
            if self.teachers and data["train"].shared_epoch is not None:
                raise ValueError("--proto-teacher needs --dataset-type csv: samples of a WebDataset have no row number")
            data["train"] = number_samples(data["train"], args.seed, args.accum_freq)
        return data

    def create_loss(self, args: Any) -> OpenClipLoss:
        """ProtoLoss. open_clip's own loss computes the contrastive part where it is asked to, and where it is all there is."""
        o = self.options
        keep = o.proto_keep_loss or args.siglip or not self.has_terms
        proto = ProtoLoss(
            w_clip=0.0 if keep else 1.0,
            w_proto=o.proto_weight,
            w_external=o.proto_weight_external,
            target_temperature=o.proto_target_temperature,
        )
        return OpenClipLoss(proto, self.original["create_loss"](args) if keep else None)

    def train_one_epoch(
        self,
        model: Any,
        data: Any,
        loss: OpenClipLoss,
        epoch: int,
        optimizer: Any,
        scaler: Any,
        scheduler: Any,
        dist_model: Any,
        args: Any,
        tb_writer: Any = None,
    ) -> None:
        """One episode: prototypes, then open_clip's own pass over the same samples."""
        module = getattr(model, "_orig_mod", model)  # of torch.compile, and below it DDP
        module = getattr(module, "module", module)
        clusters = self.has_terms and epoch >= self.options.proto_warmup_epochs
        loss.batches = data["train"].dataloader if clusters else None
        loss.proto.set_prototypes(self._prototypes(module, data["train"], epoch, args) if clusters else None)
        after_step = optimizer.register_step_post_hook(lambda *_: module.proto.clamp_scale())
        rest = (optimizer, scaler, scheduler, dist_model, args)
        try:
            self.original["train_one_epoch"](model, data, loss, epoch, *rest, tb_writer=tb_writer)
        finally:
            after_step.remove()

    def _prototypes(self, module: nn.Module, train: Any, epoch: int, args: Any) -> Prototypes:
        start, o = time.perf_counter(), self.options
        host = require("open_clip_train.train", "open-clip")
        device, dtype = torch.device(args.device), host.get_input_dtype(args.precision)
        autocast = host.get_autocast(args.precision, device_type=device.type)

        def project(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            images, texts, index = batch
            with autocast():
                out = module(images.to(device, dtype), texts.to(device))
            return index, out["image_features_projected"], out["text_features_projected"]

        train.set_epoch(epoch)
        bank = extract(module, train.dataloader.extraction, project)
        number = o.proto_num_prototypes or max(1, train.dataloader.num_samples // 10)
        clusterer = EpisodicClusterer(number, niter=o.proto_niter, nredo=o.proto_nredo, seed=args.seed)
        prototypes = clusterer.build(bank, self.teachers)
        took = time.perf_counter() - start
        logging.info(f"Episode {epoch}: {len(prototypes.index)} samples, {number} prototypes of each kind, {took:.1f} s")
        return prototypes

    @contextmanager
    def installed(self) -> Iterator[Any]:
        """``open_clip_train.main`` with the four functions replaced; they are put back at the end."""
        for name in self.original:
            setattr(self.host, name, getattr(self, name))
        try:
            yield self.host
        finally:
            for name, function in self.original.items():
                setattr(self.host, name, function)


def _teacher(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE.npy, got {text!r}")
    return name, file


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The ``--proto-`` arguments, and the rest, which is open_clip's."""
    p = argparse.ArgumentParser(
        "python -m protoclip_losses.integrations.open_clip",
        description="open_clip_train.main with ProtoLoss in place of its loss. All other arguments are those of open_clip.",
        allow_abbrev=False,
    )
    p.add_argument("--proto-weight", type=float, default=1.0, help="of the prototype terms; 0: the run of open_clip, bit for bit")
    p.add_argument("--proto-weight-external", type=float, default=1.0, help="of external teachers")
    p.add_argument("--proto-num-prototypes", type=int, help="K; default: one per 10 samples of an epoch")
    p.add_argument("--proto-target-temperature", type=float, default=0.01, help="of soft targets; 0 or less: hard targets")
    p.add_argument("--proto-warmup-epochs", type=int, default=1, help="first epochs without prototypes")
    p.add_argument("--proto-head-dim", type=int, default=128)
    p.add_argument("--proto-head-hidden-dim", type=int, default=2048)
    p.add_argument("--proto-head-norm", choices=("batch", "layer", "sync"), default="batch")
    p.add_argument("--proto-niter", type=int, default=20, help="K-means iterations")
    p.add_argument("--proto-nredo", type=int, default=1, help="K-means runs, the best of which is kept (paper: 3)")
    p.add_argument("--proto-teacher", action="append", type=_teacher, metavar="NAME=FILE.npy", help="a row per row of the csv")
    p.add_argument("--proto-teacher-dim", type=int, default=64, help="width of teachers after PCA")
    p.add_argument("--proto-keep-loss", action="store_true", help="open_clip's own loss computes the contrastive part")
    options, rest = p.parse_known_args(argv)
    if unknown := [name for name in rest if name.startswith("--proto")]:
        p.error(f"unknown arguments: {' '.join(unknown)}")
    args = require("open_clip_train.params", "open-clip").parse_args(rest)
    for refused in ("horovod", "trace", "torchscript", "distill_model"):
        if getattr(args, refused):
            p.error(f"--{refused.replace('_', '-')} does not go together with ProtoLoss")
    return options, rest


def main(argv: Sequence[str] | None = None) -> None:
    """Train: what ``python -m protoclip_losses.integrations.open_clip`` runs."""
    options, rest = parse_arguments(argv)
    launcher = Launcher(options)
    with launcher.installed() as host:
        host.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
