"""Evaluation of a run: a quick set of metrics after a pass, and the full set at the end."""

from importlib import import_module

import torch
from augment import Inputs
from encoders import DualEncoder
from evaluate import class_prompts, encode_texts, first_rows
from pairs import Pairs
from torch import Tensor

from protoclip_losses.metrics import grouping, modality_gap, retrieval_recall, zero_shot_accuracy, zero_shot_classifier

QUICK = ("validation", "concepts")
FULL = ("styles", "both")
PENALTIES = (1e-3, 1e-2, 1e-1)
KINDS = ("group", "subgroup")
ALIGNED = (
    "modality_gap",
    *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    *(f"zero_shot_{kind}" for kind in KINDS),
)
COLUMNS = (
    *(f"{part}/{metric}" for part in QUICK for metric in (*ALIGNED, *(f"ridge_probe_{kind}" for kind in KINDS))),
    *(f"{part}/{metric}" for part in FULL for metric in ALIGNED),
    *(f"{part}/linear_probe_{kind}" for part in (*QUICK, *FULL) for kind in KINDS),
    *(f"{part}/{metric}_{kind}" for part in QUICK for metric in ("ari", "ami") for kind in KINDS),
)
EVERY = 3  # the ridge probe is fitted on every third training picture


class Evaluation:
    """Metrics on the parts of the data that are not trained on, as columns `part/metric`."""

    def __init__(self, pairs: Pairs, rows: dict[str, Tensor], inputs: Inputs, judged_on: str) -> None:
        wanted = ("train", "validation", *(QUICK + FULL if judged_on == "all" else ()))
        self.parts = {name: pairs.subset(index) for name, index in rows.items() if name in wanted}
        self.inputs = inputs
        self.prompts = class_prompts(self.parts["train"])
        self.quick_train = self.parts["train"].subset(torch.arange(0, len(rows["train"]), EVERY))

    def quick(self, model: DualEncoder) -> dict[str, float]:
        """Zero-shot accuracy, retrieval, modality gap and a ridge probe, on concepts not trained on."""
        train, classifiers = encode_images(model, self.inputs, self.quick_train), self._classifiers(model)
        result: dict[str, float] = {}
        for name in self._among(QUICK):
            image = encode_images(model, self.inputs, self.parts[name])
            figures = self._aligned(model, classifiers, image, self.parts[name])
            for kind in KINDS:
                labels = self.quick_train.labels[kind], self.parts[name].labels[kind]
                figures[f"ridge_probe_{kind}"] = ridge_probe(train, labels[0], image, labels[1])
            result |= {f"{name}/{metric}": value for metric, value in figures.items()}
        return result

    def full(self, model: DualEncoder) -> dict[str, float]:
        """The same without ridge probe on styles not trained on; the linear probe on all parts; ARI and AMI on new concepts."""
        image = {name: encode_images(model, self.inputs, part) for name, part in self.parts.items()}
        classifiers = self._classifiers(model)
        result: dict[str, float] = {}
        for name in self._among(FULL):
            figures = self._aligned(model, classifiers, image[name], self.parts[name])
            result |= {f"{name}/{metric}": value for metric, value in figures.items()}
        for kind in KINDS:
            for name, accuracy in linear_probes(image, {n: part.labels[kind] for n, part in self.parts.items()}).items():
                result[f"{name}/linear_probe_{kind}"] = accuracy
            for name in self._among(QUICK):
                found = grouping(image[name], self.parts[name].labels[kind])
                result |= {f"{name}/{metric}_{kind}": value for metric, value in found.items()}
        return result

    def _among(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in self.parts]

    def _classifiers(self, model: DualEncoder) -> dict[str, Tensor]:
        """Zero-shot classifiers; all parts share them."""
        cpu = torch.device("cpu")
        return {
            kind: zero_shot_classifier([encode_texts(model, self.inputs, texts, cpu) for texts in self.prompts[kind]])
            for kind in KINDS
        }

    def _aligned(self, model: DualEncoder, classifiers: dict[str, Tensor], image: Tensor, part: Pairs) -> dict[str, float]:
        result = alignment(model, self.inputs, image, part)
        for kind, classifier in classifiers.items():
            result[f"zero_shot_{kind}"] = zero_shot_accuracy(image, part.labels[kind], classifier)["top1"]
        return result


def alignment(model: DualEncoder, inputs: Inputs, image: Tensor, part: Pairs) -> dict[str, float]:
    """Modality gap, and retrieval among one caption for each concept."""
    once = first_rows(part.concepts)
    text = encode_texts(model, inputs, [part.captions[int(row)] for row in once], torch.device("cpu"))
    found = retrieval_recall(image, text, part.concepts, text_concepts=part.concepts[once])
    return {"modality_gap": modality_gap(image, text), **found}


@torch.no_grad()
def encode_images(model: DualEncoder, inputs: Inputs, part: Pairs) -> Tensor:
    """Outputs of the image encoder, without augmentation."""
    model.eval()
    batches = (part.pictures[index] for index in torch.split(torch.arange(len(part)), 256))
    return torch.cat([model.clip.encode_image(inputs.plain(batch)).float() for batch in batches])  # type: ignore[operator]


def ridge_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, penalty: float = 0.1) -> float:
    """Accuracy of ridge regression onto one-hot classes: a linear probe in closed form, cheap enough for every pass."""
    mean, deviation = train_x.mean(0), train_x.std(0) + 1e-6
    x = (train_x - mean) / deviation
    y = torch.nn.functional.one_hot(train_y).float()
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))
    predicted = ((test_x - mean) / deviation @ weights + y.mean(0)).argmax(1)
    return float((predicted == test_y).float().mean())


def linear_probes(image: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of logistic regression, fitted on ``train``, on each of the other parts.

    The penalty is chosen on the validation concepts, and one fit serves all parts. The library's ``linear_probe`` would fit
    once per part, and choose the penalty on pictures of concepts it was fitted on.
    """
    linear_model, preprocessing = (import_module(f"sklearn.{name}") for name in ("linear_model", "preprocessing"))
    scaler = preprocessing.StandardScaler().fit(image["train"].numpy())
    x = {name: scaler.transform(features.numpy()) for name, features in image.items()}
    probes = [
        linear_model.LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(x["train"], labels["train"].numpy()) for c in PENALTIES
    ]
    best = max(probes, key=lambda probe: probe.score(x["validation"], labels["validation"].numpy()))
    return {name: float(best.score(x[name], labels[name].numpy())) for name in x if name != "train"}
