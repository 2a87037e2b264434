"""Real pairs in the forms that the hosts' own data pipelines read."""

from pathlib import Path

from pair_files import emoji_with_groups
from PIL import Image


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
