"""The table at the end: metrics on held-out concepts, for the trained encoder and for a randomly initialised one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from augment import Inputs
from encoders import DualEncoder
from pairs import Pairs, load_batches
from torch import Tensor
from tqdm import tqdm

from protoclip_losses import EpisodicClusterer
from protoclip_losses.metrics import (
    grouping,
    linear_probe,
    modality_gap,
    retrieval_recall,
    zero_shot_accuracy,
    zero_shot_classifier,
)
from protoclip_losses.plots import cluster_grid, loss_curves, modality_map

log = logging.getLogger("train")
MAX_PLOTTED = 5000  # held-out pairs that are plotted
TITLES = {
    "zero_shot_group": "zero-shot",
    "zero_shot_subgroup": "zs-fine",
    "linear_probe": "probe",
    "image_to_text_recall@1": "I>T R@1",
    "image_to_text_recall@5": "R@5",
    "image_to_text_recall@10": "R@10",
    "text_to_image_recall@1": "T>I R@1",
    "text_to_image_recall@5": "R@5",
    "text_to_image_recall@10": "R@10",
    "ari": "ARI",
    "ami": "AMI",
    "modality_gap": "gap",
}


def evaluate(
    model: DualEncoder, inputs: Inputs, train: Pairs, held_out: Pairs, device: torch.device, workers: int, name: str
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Metrics of one encoder, and its image (N, width) and text (N, width) features of the held-out pairs.

    Retrieval and modality gap need no labels; zero-shot accuracy, linear probe and grouping are evaluated if there are some.
    The gallery of retrieval holds one caption per concept, and every picture of the concept is a right answer.
    """
    image, text = encode_pairs(model, inputs, held_out, device, workers, f"held-out pairs, {name}")
    unique = first_rows(held_out.concepts)
    result = {"modality_gap": modality_gap(image, text)}
    result |= retrieval_recall(image, text[unique], held_out.concepts, text_concepts=held_out.concepts[unique])
    if held_out.labels:
        for kind, prompts in class_prompts(train).items():
            classifier = zero_shot_classifier([encode_texts(model, inputs, texts, device) for texts in prompts])
            result[f"zero_shot_{kind}"] = zero_shot_accuracy(image, held_out.labels[kind], classifier)["top1"]
        train_image, _ = encode_pairs(model, inputs, train, device, workers, f"training pairs, {name}")
        groups = held_out.labels["group"]
        result["linear_probe"] = linear_probe(train_image, train.labels["group"], image, groups)["accuracy"]
        result |= grouping(image, groups)
    return result, image, text


def first_rows(concepts: Tensor) -> Tensor:
    """The first row of each concept."""
    seen: dict[int, int] = {}
    for row, concept in enumerate(concepts.tolist()):
        seen.setdefault(concept, row)
    return torch.tensor(list(seen.values()))


@torch.no_grad()
def encode_pairs(
    model: DualEncoder, inputs: Inputs, pairs: Pairs, device: torch.device, workers: int, name: str
) -> tuple[Tensor, Tensor]:
    """Encoder outputs z of all pairs, without augmentation: image and text (N, width), on the CPU."""
    model.eval()
    order = list(torch.split(torch.arange(len(pairs)), 256))
    image, text = [], []
    batches = load_batches(pairs, inputs.tokenize, order, workers)
    for _, pictures, tokens in tqdm(batches, desc=name, total=len(order), leave=False):
        z_image, z_text = model.encode(inputs.plain(pictures.to(device)), tokens.to(device))
        image.append(z_image.float().cpu())
        text.append(z_text.float().cpu())
    return torch.cat(image), torch.cat(text)


@torch.no_grad()
def encode_texts(model: DualEncoder, inputs: Inputs, texts: list[str], device: torch.device) -> Tensor:
    model.eval()
    features: Tensor = model.clip.encode_text(inputs.tokenize(texts).to(device))  # type: ignore[operator]
    return features.float().cpu()


def class_prompts(pairs: Pairs) -> dict[str, list[list[str]]]:
    """Prompts of each class: its name; for a group also the names of its subgroups, which describe its contents."""
    subgroups_of: dict[int, set[int]] = {}
    for group, subgroup in zip(pairs.labels["group"].tolist(), pairs.labels["subgroup"].tolist(), strict=True):
        subgroups_of.setdefault(group, set()).add(subgroup)
    subgroups = [name.replace("-", " ") for name in pairs.label_names["subgroup"]]
    groups = [[name, *(subgroups[i] for i in sorted(subgroups_of[g]))] for g, name in enumerate(pairs.label_names["group"])]
    return {"group": groups, "subgroup": [[name] for name in subgroups]}


def report(
    encoders: dict[str, DualEncoder],
    inputs: Inputs,
    train: Pairs,
    held_out: Pairs,
    device: torch.device,
    workers: int,
    run_dir: Path,
) -> None:
    """Evaluate the encoders, print and save the table, and plot the features of the last one."""
    rows = {}
    for name, model in encoders.items():
        rows[name], image, text = evaluate(model, inputs, train, held_out, device, workers, name)
    table = format_table(rows, train, held_out)
    (run_dir / "table.json").write_text(json.dumps(rows, indent=1))
    (run_dir / "table.txt").write_text(table + "\n")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if records:
        loss_curves(records, run_dir / "loss_curves.png")
    plotted = torch.arange(min(len(held_out), MAX_PLOTTED))
    part, image, text = held_out.subset(plotted), image[plotted], text[plotted]
    modality_map(image, text, part.labels.get("group"), part.label_names.get("group"), run_dir / "map.png")
    clusters = EpisodicClusterer(max(1, len(part) // 10)).fit(torch.nn.functional.normalize(image, dim=1))
    cluster_grid(part.pictures, clusters.labels, list(part.captions), run_dir / "clusters.png")
    log.info("figures and table are in %s", run_dir)
    print(table)


def format_table(rows: dict[str, dict[str, float]], train: Pairs, held_out: Pairs) -> str:
    """One line per encoder, then a legend of the columns."""
    keys = [key for key in TITLES if key in next(iter(rows.values()))]
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "".join(f"{TITLES[key]:>{max(len(TITLES[key]), 5) + 2}}" for key in keys)]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[key]:>{max(len(TITLES[key]), 5) + 2}.3f}" for key in keys))
    concepts = len(set(held_out.concepts.tolist()))
    lines.append(f"{len(held_out)} pairs of {concepts} concepts held out; trained on {len(train)} pairs. I>T, T>I: retrieval,")
    lines.append("image to text and text to image, any picture or caption of the concept counts. gap: modality gap.")
    if held_out.labels:
        groups, fine = held_out.labels["group"], held_out.labels["subgroup"]
        most, most_fine = (float(label.bincount().max()) / len(label) for label in (groups, fine))
        lines.append(
            f"zero-shot, probe, ARI and AMI are over {len(held_out.label_names['group'])} groups (the largest holds {most:.3f}), "
            f"zs-fine over {len(held_out.label_names['subgroup'])} subgroups ({most_fine:.3f})."
        )
    return "\n".join(lines)
