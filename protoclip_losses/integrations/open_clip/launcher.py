"""The launcher: open_clip 3.3's own trainer with ProtoLoss.

    python -m protoclip_losses.integrations.open_clip --proto-num-prototypes 20000 ARGUMENTS OF open_clip_train.main

An epoch of open_clip is an episode: before it, one pass over the epoch's samples in eval mode, K-means and back translation.
With ``--proto-online`` there are no episodes: prototypes come from a queue of recent features, and without ``--proto-teacher``
the data pipeline is unchanged. open_clip's package is not modified; functions that its ``main`` calls are replaced while it runs.
"""

import argparse
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require
from ...episodes import extract
from ...losses import ProtoLoss
from ...prototypes import EpisodicClusterer, Prototypes
from ...teachers import TeacherAdapter
from ..teachers import Teacher, build_episode
from .arguments import parse_arguments
from .checkpoint import (
    ResumedOptimizer,
    checkpoint_to_resume,
    load_pretrained_heads,
    parameter_names,
    separate_heads,
    unwrapped,
    without_heads,
)
from .data import number_samples
from .model import OpenClipLoss, add_heads
from .online import load_state, online_prototypes, save_state
from .teachers import read_teachers


class Launcher:
    """Replacements for functions that ``open_clip_train.main`` calls, each of which calls the original.

    **Use it when:** you start open_clip's trainer from Python; from a shell, ``python -m`` runs this package.
    **Not when:** you have a loop of your own: :func:`add_heads` and :class:`~protoclip_losses.ProtoLoss` are enough.
    **Related:** :class:`OpenClipLoss`, :func:`parse_arguments`.

    Args:
        options: the ``--proto-`` arguments, as :func:`parse_arguments` returns them.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.host = require("open_clip_train.main", "open-clip")
        names = ("create_model_and_transforms", "get_data", "create_loss", "train_one_epoch", "pt_load")
        self.original = {name: getattr(self.host, name) for name in names}
        self.teachers: dict[str, Teacher] = {}  # read when the data are known
        given = options.proto_teacher and options.proto_weight_external > 0
        self.has_terms = options.proto_weight > 0 or bool(given)
        self.model: Any = None
        self.optimizer: Any = None

    def create_model_and_transforms(self, name: str, pretrained: str | None = None, **kwargs: Any) -> Any:
        """The model with heads, those of ``--pretrained`` if it has some. A second model is the one to distill from."""
        model, *transforms = self.original["create_model_and_transforms"](name, pretrained, **kwargs)
        if self.model is None:
            o = self.options
            self.model = add_heads(model, o.proto_head_dim, o.proto_head_hidden_dim, o.proto_head_norm)
            # Without terms, no zero gradients either: one more zero in the norm of all gradients can change its rounding.
            model.proto.requires_grad_(self.has_terms)
            if pretrained and os.path.isfile(pretrained):
                load_pretrained_heads(model.proto, pretrained)
        return model, *transforms

    def pt_load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """The checkpoint of ``--resume``, with heads among its entries."""
        return checkpoint_to_resume(self.original["pt_load"](path, *args, **kwargs), self.model.proto, path)

    def get_data(self, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """The data, with an index per training sample if there will be prototypes of episodes, or a teacher."""
        data = self.original["get_data"](args, *rest, **kwargs)
        if "train" in data and self.has_terms and (self.options.proto_teacher or not self.options.proto_online):
            if self.options.proto_teacher:
                self.teachers = {**read_teachers(self.options, data["train"])}
            data["train"] = number_samples(data["train"], args.seed, args.accum_freq)
        return data

    def create_loss(self, args: Any) -> OpenClipLoss:
        """ProtoLoss. open_clip's own loss computes the contrastive part if it is asked to, or if there is no other part."""
        o = self.options
        keep = o.proto_keep_loss or args.siglip or args.distill or not self.has_terms
        proto = ProtoLoss(
            w_clip=0.0 if keep else 1.0,
            w_proto=o.proto_weight,
            w_external=o.proto_weight_external,
            target_temperature=o.proto_target_temperature,
            gather_with_grad=not o.proto_no_gather_with_grad,
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
        """One episode: prototypes, then open_clip's own pass over the same samples. In online mode that pass alone."""
        module, self.optimizer = unwrapped(model), optimizer
        online = self.has_terms and self.options.proto_online
        clusters = self.has_terms and not online and epoch >= self.options.proto_warmup_epochs
        loss.batches = data["train"].dataloader if clusters or (online and self.teachers) else None
        if not online:
            loss.proto.set_prototypes(self._prototypes(module, data["train"], epoch, args, loss.proto) if clusters else None)
        elif loss.proto.prototypes is None:
            loss.proto.set_prototypes(online_prototypes(self.options, data["train"].dataloader, args))
            load_state(loss.proto, epoch, args)
            loss.teachers = self.teachers
        after_step = optimizer.register_step_post_hook(lambda *_: module.proto.clamp_scale())
        rest = (optimizer, scaler, scheduler, dist_model, args)
        try:
            self.original["train_one_epoch"](model, data, loss, epoch, *rest, tb_writer=tb_writer)
        finally:
            after_step.remove()
        if online:
            save_state(loss.proto, epoch + 1, args)

    def _prototypes(self, module: nn.Module, train: Any, epoch: int, args: Any, loss: ProtoLoss) -> Prototypes:
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
        clusterer = EpisodicClusterer(number, niter=o.proto_niter, nredo=o.proto_nredo, seed=args.seed, device=device)
        for name, teacher in self.teachers.items():
            if isinstance(teacher, TeacherAdapter):  # once: every epoch has all rows of the csv
                self.teachers[name] = clusterer.fit_teacher(teacher)
        prototypes = build_episode(clusterer, bank, self.teachers, loss)
        prototypes.calls_per_step = args.accum_freq
        took = time.perf_counter() - start
        logging.info(f"Episode {epoch}: {len(prototypes.index)} samples, {number} prototypes of each kind, {took:.1f} s")
        return prototypes

    @contextmanager
    def installed(self) -> Iterator[Any]:
        """``open_clip_train.main`` with the functions replaced; they are put back at the end."""
        factory = require("open_clip.factory", "open-clip")
        read, save, load_optimizer = factory.load_state_dict, torch.save, torch.optim.Optimizer.load_state_dict

        def save_separated(saved: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(saved, dict) and saved.keys() >= {"epoch", "state_dict", "optimizer"}:
                saved = separate_heads(saved, parameter_names(self.model, self.optimizer))
            save(saved, *args, **kwargs)

        def load_resumed(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            if isinstance(state, ResumedOptimizer):
                state = state.of(parameter_names(self.model, optimizer))
            load_optimizer(optimizer, state)

        with ExitStack() as stack:
            for name in self.original:
                stack.enter_context(_replaced(self.host, name, getattr(self, name)))
            stack.enter_context(_replaced(factory, "load_state_dict", lambda *a, **k: without_heads(read(*a, **k))))
            stack.enter_context(_replaced(torch, "save", save_separated))
            stack.enter_context(_replaced(torch.optim.Optimizer, "load_state_dict", load_resumed))
            yield self.host


@contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, original)


def main(argv: Sequence[str] | None = None) -> None:
    """Train: what ``python -m protoclip_losses.integrations.open_clip`` runs."""
    options, rest = parse_arguments(argv)
    launcher = Launcher(options)
    with launcher.installed() as host:
        host.main(rest)
