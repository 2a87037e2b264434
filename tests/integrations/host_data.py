"""Real pairs in the forms that the hosts' own data pipelines read."""

from pathlib import Path

import torch
from PIL import Image

from pair_files import emoji_with_groups  # isort: skip
from encoders import WordHash  # isort: skip


def write_csv(folder: Path, rows: int) -> Path:
    """open_clip's csv form: a table of picture path and caption."""
    pairs, _ = emoji_with_groups()
    lines = ["filepath\ttitle"]
    for i in range(rows):
        picture = folder / f"{i}.png"
        Image.fromarray(pairs.pictures[i].permute(1, 2, 0).numpy()).save(picture)
        lines.append(f"{picture}\t{pairs.captions[i]}")
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


class TensorPairs(torch.utils.data.Dataset):
    """Pictures of 32 x 32 and word numbers, as the mappings that a Trainer's data set holds."""

    def __init__(self, rows: int, vocabulary: int = 512, length: int = 12) -> None:
        pairs, _ = emoji_with_groups()
        tokenize = WordHash(vocabulary, length)
        self.pictures = torch.nn.functional.interpolate(pairs.pictures[:rows].float() / 255, size=32, mode="area")
        self.tokens = tokenize([pairs.captions[i] for i in range(rows)])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        mask = (self.tokens[i] != 0).long()
        return {"pixel_values": self.pictures[i], "input_ids": self.tokens[i], "attention_mask": mask}
