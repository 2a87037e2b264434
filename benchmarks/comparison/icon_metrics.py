"""Evaluation of a run on the icons: retrieval of new names, and classes of sets that no encoder was trained on."""

import statistics

import torch
from augment import Inputs
from encoders import DualEncoder
from evaluate import encode_texts
from pairs import Pairs
from torch import Tensor

from protoclip_losses.metrics import grouping, zero_shot_accuracy, zero_shot_classifier

from .metrics import alignment, encode_images, linear_probes, ridge_probe

PARTS = ("validation", "test")
ALIGNED = ("modality_gap", *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)))
OF_SETS = ("zero_shot_group", "ridge_probe_group")
AT_THE_END = ("linear_probe_group", "ari_group", "ami_group")
COLUMNS = (
    *(f"{part}/{metric}" for part in PARTS for metric in (*ALIGNED, *OF_SETS, *AT_THE_END)),
    *(f"unseen/{metric}" for metric in ALIGNED),
)


class IconEvaluation:
    """Metrics as columns `part/metric`.

    `validation` and `test` are names that were not trained on: retrieval among them is in the sets that were trained on, and
    zero-shot accuracy, probes and grouping are means over the unseen sets, each with its own categories as classes. A probe is
    fitted on the set's other names. `unseen` is retrieval among names in unseen sets.
    """

    def __init__(self, pairs: Pairs, rows: dict[str, Tensor], inputs: Inputs, judged_on: str) -> None:
        self.inputs = inputs
        self.judged = PARTS if judged_on == "all" else PARTS[:1]
        wanted = ("validation", "fit", "unseen_validation", *(("test", "unseen") if judged_on == "all" else ()))
        self.parts = {name: pairs.subset(rows[name]) for name in wanted}

    def quick(self, model: DualEncoder) -> dict[str, float]:
        """On validation names: retrieval, zero-shot accuracy and a ridge probe."""
        return self._aligned(model, "validation") | self._classes(model, PARTS[:1], [ridge_probes])

    def full(self, model: DualEncoder) -> dict[str, float]:
        """On all names: also the linear probe, and how K-means of the pictures agrees with the categories."""
        result: dict[str, float] = {}
        for part in self.judged:
            result |= self._aligned(model, part)
        if "unseen" in self.parts:
            result |= self._aligned(model, "unseen")
        return result | self._classes(model, self.judged, [ridge_probes, chosen_probes, groups])

    def _aligned(self, model: DualEncoder, part: str) -> dict[str, float]:
        image = encode_images(model, self.inputs, self.parts[part])
        return {f"{part}/{metric}": value for metric, value in alignment(model, self.inputs, image, self.parts[part]).items()}

    def _classes(self, model: DualEncoder, judged: tuple[str, ...], methods: list) -> dict[str, float]:  # type: ignore[type-arg]
        own = {"validation": "unseen_validation", "test": "unseen"}
        names = {"train": "fit", **{part: own[part] for part in judged}}
        images = {part: encode_images(model, self.inputs, self.parts[name]) for part, name in names.items()}
        pairs = {part: self.parts[name] for part, name in names.items()}
        found: dict[str, list[float]] = {}
        for number in sorted(set(pairs["train"].labels["style"].tolist())):
            rows = {part: (p.labels["style"] == number) & (p.labels["group"] >= 0) for part, p in pairs.items()}
            x = {part: image[rows[part]] for part, image in images.items()}
            classes, y = consecutive({part: p.labels["group"][rows[part]] for part, p in pairs.items()})
            prompts = [pairs["train"].label_names["group"][c].partition("/")[2].lower() for c in classes]
            classifier = zero_shot_classifier([encode_texts(model, self.inputs, [text], torch.device("cpu")) for text in prompts])
            for part in judged:
                accuracy = zero_shot_accuracy(x[part], y[part], classifier)["top1"]
                found.setdefault(f"{part}/zero_shot_group", []).append(accuracy)
            for method in methods:
                for column, value in method(x, y).items():
                    found.setdefault(column, []).append(value)
        return {column: statistics.fmean(values) for column, values in found.items()}


def consecutive(labels: dict[str, Tensor]) -> tuple[list[int], dict[str, Tensor]]:
    """The classes that occur, and the labels as positions among them."""
    classes = sorted({int(label) for own in labels.values() for label in own})
    return classes, {part: torch.searchsorted(torch.tensor(classes), own) for part, own in labels.items()}


def ridge_probes(x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, float]:
    return {f"{part}/ridge_probe_group": ridge_probe(x["train"], y["train"], x[part], y[part]) for part in x if part != "train"}


def chosen_probes(x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, float]:
    return {f"{part}/linear_probe_group": accuracy for part, accuracy in linear_probes(x, y).items()}


def groups(x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, float]:
    found = {part: grouping(x[part], y[part]) for part in x if part != "train"}
    return {f"{part}/{metric}_group": value for part, values in found.items() for metric, value in values.items()}
