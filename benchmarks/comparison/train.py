"""One run of the comparison: the single training loop that all arms share."""

import os

# Threads that spin while they wait slow down every other process of the machine; read when torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from encoders import DualEncoder, WordHash, build_model, minilm_encoder
from torch import Tensor
from train_cc3m import learning_rate, parameter_groups

from protoclip_losses import (
    Clustering,
    EpisodeSampler,
    EpisodicClusterer,
    FeatureBank,
    OnlinePrototypes,
    ProtoLoss,
    Prototypes,
    TeacherAdapter,
)
from protoclip_losses.functional import caption_ids

from .arms import Schedule, Settings, apart, is_evaluated, pool_rows, shuffled_captions
from .data import DataSet
from .extras import WordClasses, sampled_terms

EXTRACTION, TRAINING = 0, 1  # phases of an episode, each with its own random augmentation
PROJECTION = 128  # width of the projected features and of the teacher's features
WORDS = 16  # captions are truncated to this length; nine of ten are not longer


def train(settings: Settings, seed: int, file: Path, data: DataSet) -> Iterator[dict[str, Any]]:
    """Train, and yield a row of metrics after each episode where :func:`is_evaluated`; the last row holds the full set."""
    pairs = data.load(file)
    rows = data.splits(pairs)
    train_pairs = pairs.subset(rows["train"])
    captions = list(train_pairs.captions) if settings.captions == "own" else shuffled_captions(train_pairs)
    chosen = pool_rows(train_pairs, settings)
    pool, pool_captions = train_pairs.subset(chosen), [captions[row] for row in chosen.tolist()]
    model, inputs = build_model("small", seed, PROJECTION, settings.head_width, settings.head_norm)
    inputs = replace(inputs, side=settings.side, tokenize=WordHash(length=WORDS))
    # bfloat16 makes the convolutions twice as fast but not the text encoder; the losses are in float32.
    in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")
    model.clip.visual.forward = in_bf16(model.clip.visual.forward)  # type: ignore[union-attr]
    tokens = inputs.tokenize(pool_captions)
    evaluation = data.evaluation(pairs, rows, inputs, settings.judged_on)
    del pairs, train_pairs
    if settings.passes == 0:
        yield {"pass": 0, "samples": 0, **evaluation.quick(model), **evaluation.full(model)}
        return
    clock, step, schedule = Clock(), 0, Schedule(settings, len(pool))
    teachers: dict[str, TeacherAdapter] = {}
    wants_teacher = settings.w_external > 0 or settings.distill != "none"
    if wants_teacher and settings.teacher in ("minilm", "both"):
        teachers["minilm"] = TeacherAdapter.from_tensor(load_minilm(captions, file)[chosen])
    if wants_teacher and settings.teacher in ("words", "both"):
        with clock.stage("clustering"):
            teachers["words"] = TeacherAdapter.from_captions(pool_captions, settings.teacher_dim)
    uses_heads = settings.method != "clip" or settings.distill != "none"
    ids = None if settings.repeats == "none" else caption_ids(pool_captions)

    width = 2 * PROJECTION if settings.gap else PROJECTION
    steps_per_episode = -(-schedule.episode_size // settings.batch_size)
    loss = ProtoLoss(
        w_proto=settings.w_proto,
        w_external=0.0 if settings.sampled else settings.w_external,
        w_distill=settings.w_distill if settings.distill != "none" else 0.0,
        distill_temperature=settings.distill_temperature,
        repeats=None if ids is None else settings.repeats,
        target_temperature=settings.target_temperature,
        external_target_temperature=settings.external_target_temperature,
        back_translation=settings.back_translation,
        normalize_prototypes=settings.normalize_prototypes,
    )
    loss.set_prototypes(None)
    if settings.method == "online":
        warmup = schedule.first * steps_per_episode
        every = settings.cluster_every * steps_per_episode
        loss.set_prototypes(OnlinePrototypes(settings.num_prototypes, schedule.episode_size, every, warmup, seed=seed))
    build = Clusters(settings, teachers, seed)
    sampler = EpisodeSampler(len(pool), schedule.episode_size, seed=seed, episodes=schedule.episodes)
    parameters = parameter_groups(model, settings.weight_decay)
    classes: WordClasses | None = None
    if settings.word_classes:
        width_of_image = model.clip.visual.project.out_features  # type: ignore[union-attr]
        classes = WordClasses(pool_captions, 4096, int(width_of_image), seed)  # type: ignore[arg-type]
        parameters.append({"params": [classes.prototypes], "weight_decay": settings.weight_decay})
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, fused=True)
    draw = torch.Generator().manual_seed(seed)
    prototypes: Prototypes | None = None
    bank: FeatureBank | None = None
    samples = 0

    for episode in sampler:
        batches = torch.split(episode.index, settings.batch_size)
        with_prototypes = schedule.with_prototypes(episode.number)
        if settings.method == "episodic" and not with_prototypes:
            prototypes = None
            loss.set_prototypes(prototypes)
        elif settings.method == "episodic" and schedule.clusters(episode.number):
            if settings.features == "extracted":
                with clock.stage("extraction"), torch.no_grad():
                    model.eval()
                    bank = FeatureBank(episode.index, width)
                    for index in batches:
                        crops = inputs.augment(pool.pictures[index], index, seed, episode.number, EXTRACTION)
                        out = encode(model, crops, tokens[index], True, settings.gap)
                        bank.update(index, out["image_features_projected"], out["text_features_projected"])
            assert bank is not None
            with clock.stage("clustering"):
                prototypes = build(bank, episode.index)
                loss.set_prototypes(prototypes)
            assert prototypes.report is not None
            clock.cpu["back_translation"] += prototypes.report.seconds["back_translate"]

        model.train()
        if settings.features == "training":
            bank = FeatureBank(episode.index, width)
        with clock.stage("training"):
            for index in batches:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, schedule.episodes * steps_per_episode, settings)  # type: ignore[arg-type]
                crops = inputs.augment(pool.pictures[index], index, seed, episode.number, TRAINING)
                out = encode(model, crops, tokens[index], uses_heads, settings.gap)
                is_online = settings.method == "online"
                needs_rows = settings.distill != "none" or (is_online and settings.w_external > 0)
                with clock.stage("loss"):
                    total = loss(
                        **out,
                        index=None if is_online else index,
                        ids=None if ids is None else ids[index],
                        teacher_features={name: teacher[index] for name, teacher in teachers.items()} if needs_rows else None,
                    )
                    if settings.sampled and prototypes is not None:
                        total = total + settings.w_external * sampled_terms(prototypes, out, index, settings.sampled, draw)
                    if classes is not None:
                        total = total + settings.word_classes * classes(out["image_features"], index, out["logit_scale"])
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                model.clamp_scales()
                step += 1
                if settings.features == "training" and bank is not None:
                    heads = (out[f"{modality}_features_projected"].detach() for modality in ("image", "text"))
                    bank.update(index, *heads)

        done = episode.number + 1
        samples += len(episode.index)
        row = {"pass": done, "samples": samples, **clock.columns()}
        if is_evaluated(done, schedule.episodes):
            row |= evaluation.quick(model)
            if done == schedule.episodes:
                row |= evaluation.full(model)
            yield row


class Clusters:
    """The prototypes of an episode: of image and text where they have a weight, and of the teachers."""

    def __init__(self, settings: Settings, teachers: dict[str, TeacherAdapter], seed: int) -> None:
        self.settings, self.teachers = settings, teachers if settings.w_external else {}
        self.clusterer = EpisodicClusterer(settings.num_prototypes, seed=seed)
        levels = (settings.teacher_prototypes or settings.num_prototypes, *settings.teacher_levels)
        self.of_teachers = [EpisodicClusterer(n, labels_per_sample=settings.labels_per_sample, seed=seed) for n in levels]
        self.whole: dict[str, Clustering] = {}

    def __call__(self, bank: FeatureBank, index: Tensor) -> Prototypes:
        settings = self.settings
        if settings.teacher_clusters == "whole" and not self.whole:
            self.whole = {
                f"{name}_{level.num_prototypes}" if number else name: level.fit_teacher(teacher)
                for name, teacher in self.teachers.items()
                for number, level in enumerate(self.of_teachers)
            }
        internal = settings.w_proto > 0 or not self.teachers
        if not self.whole:
            return self.clusterer.build(bank, self.teachers, internal=internal)
        return self.clusterer.build(bank, self.whole, internal=internal, index=None if internal else index)


def encode(model: DualEncoder, crops: Tensor, tokens: Tensor, heads: bool, gap: float) -> dict[str, Tensor]:
    """The arguments of the loss; plain CLIP does not compute the heads."""
    image, text = (z.float() for z in model.encode(crops, tokens))
    out = {
        "image_features": F.normalize(image, dim=1),
        "text_features": F.normalize(text, dim=1),
        "logit_scale": model.logit_scale.exp(),
    }
    if heads:
        out |= {
            "image_features_projected": F.normalize(model.image_head(image), dim=1),
            "text_features_projected": F.normalize(model.text_head(text), dim=1),
            "logit_scale_proto": model.logit_scale_proto.exp(),
        }
    return apart(out, gap) if gap else out


def load_minilm(captions: list[str], file: Path) -> TeacherAdapter:
    """MiniLM's features of the training captions: encoded on the first call, then cached beside the file of the pictures.

    The time of the model is not counted: every run would have to encode the same captions.
    """
    cache = file.with_name(f"minilm_{file.stem}.npy")
    return TeacherAdapter.from_encoder(minilm_encoder(torch.device("cpu")), captions, cache=cache, dim=PROJECTION)


class Clock:
    """Wall and CPU seconds of this process by stage; on a shared machine only CPU time is comparable between runs."""

    def __init__(self) -> None:
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu

    def columns(self) -> dict[str, float]:
        # Not summed: the loss is part of training, and back translation is part of clustering.
        stages = ("extraction", "clustering", "training")
        return {
            "wall_s": sum(self.wall[stage] for stage in stages),
            "cpu_s": sum(self.cpu[stage] for stage in stages),
            **{f"cpu_{stage}_s": self.cpu[stage] for stage in (*stages, "back_translation", "loss")},
        }
