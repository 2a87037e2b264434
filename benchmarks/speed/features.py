"""Real features for benchmarks/clustering.py, 60,000 rows of width 128, from the example's data.

python benchmarks/features.py captions captions.npy                        # MiniLM's, of captions and parts of captions
python examples/train_cc3m.py --episodes 5 --run-dir runs/features
python benchmarks/features.py pictures pictures.npy --run-dir runs/features  # the trained model's, of augmented pictures
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
    """MiniLM's embeddings of distinct captions, each some of the names and tags of one emoji, reduced by PCA."""
    draw, found = random.Random(0), set()
    for caption in emoji_pairs(32, ("twemoji",)).captions:
        words = caption.split(", ")
        for _ in range(400):
            found.add(", ".join(draw.sample(words, draw.randint(1, min(6, len(words))))))
    texts = sorted(found)
    draw.shuffle(texts)
    encode = minilm_encoder(torch.device("cpu"))
    texts = texts[:rows]
    wide = F.normalize(torch.cat([encode(texts[i : i + 512]).float() for i in range(0, len(texts), 512)]), dim=1)
    return F.normalize(PCA.fit([wide], 128)(wide), dim=1)


def pictures(rows: int, run_dir: Path) -> Tensor:
    """The image head's output for pictures under the example's augmentation, each several times."""
    model, inputs = build_model("small", 0, 128, 512, "batch")
    checkpoint = run_dir / json.loads((run_dir / "checkpoint.json").read_text())["folder"] / "shared.pt"
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    model.eval()
    pairs = emoji_pairs(32)

    def blocks() -> Iterator[Tensor]:
        every = torch.arange(len(pairs))
        for episode in range(1000):
            for index in torch.split(every, 512)[: len(pairs) // 512]:  # whole blocks
                texts = inputs.tokenize([pairs.captions[int(i)] for i in index])
                yield model(inputs.augment(pairs.pictures[index], index, 0, episode, 0), texts)["image_features_projected"]

    with torch.no_grad():
        return torch.cat(list(islice(blocks(), -(-rows // 512))))[:rows].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("captions", "pictures"))
    parser.add_argument("file")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/features"))
    parser.add_argument("--rows", type=int, default=60_000)
    args = parser.parse_args()
    np.save(args.file, captions(args.rows) if args.what == "captions" else pictures(args.rows, args.run_dir))


if __name__ == "__main__":
    main()
