"""Real features for `clustering.py`: 60,000 rows of width 128, from the data of the example.

python -m benchmarks.speed.features captions captions.npy    # MiniLM's features of captions and parts of captions

python examples/train_cc3m.py --episodes 5 --run-dir runs/features
python -m benchmarks.speed.features pictures pictures.npy --run-dir runs/features    # the trained model's, of pictures
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from encoders import build_model, minilm_encoder
from pairs import emoji_pairs
from torch import Tensor

from protoclip_losses.teachers import PCA


def captions(rows: int) -> Tensor:
    """MiniLM's embeddings of distinct captions, random subsets of an emoji's name and tags, reduced by PCA."""
    draw, found = random.Random(0), set()
    for caption in emoji_pairs(32, ("twemoji",)).captions:
        words = caption.split(", ")
        for _ in range(400):
            found.add(", ".join(draw.sample(words, draw.randint(1, min(6, len(words))))))
    texts = sorted(found)
    draw.shuffle(texts)
    encode = minilm_encoder(torch.device("cpu"))
    texts = texts[:rows]
    features = F.normalize(torch.cat([encode(texts[i : i + 512]).float() for i in range(0, len(texts), 512)]), dim=1)
    return F.normalize(PCA.fit([features], 128)(features), dim=1)


def pictures(rows: int, run_dir: Path) -> Tensor:
    """Projected image features of pictures under the example's augmentation, several views of each."""
    model, inputs = build_model("small", 0, 128, 512, "batch")
    checkpoint = run_dir / json.loads((run_dir / "checkpoint.json").read_text())["folder"] / "shared.pt"
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    model.eval()
    pairs = emoji_pairs(32)

    def blocks() -> Iterator[Tensor]:
        rows = torch.arange(len(pairs))
        for episode in range(1000):
            for index in torch.split(rows, 512)[: len(pairs) // 512]:  # full blocks only
                texts = inputs.tokenize([pairs.captions[int(i)] for i in index])
                yield model(inputs.augment(pairs.pictures[index], index, 0, episode, 0), texts)["image_features_projected"]

    with torch.no_grad():
        return torch.cat(list(islice(blocks(), -(-rows // 512))))[:rows].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("captions", "pictures"), help="what the features are of")
    parser.add_argument("file", help="NPY file to write")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/features"), help="run of the trained model, for pictures")
    parser.add_argument("--rows", type=int, default=60_000)
    args = parser.parse_args()
    np.save(args.file, captions(args.rows) if args.kind == "captions" else pictures(args.rows, args.run_dir))


if __name__ == "__main__":
    main()
