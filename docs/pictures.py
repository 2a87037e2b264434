"""Take the pictures and the table of a run into the documentation, each picture under 300 KB.

python examples/train_cc3m.py --run-dir runs/docs
python docs/pictures.py runs/docs
"""

import shutil
import sys
from pathlib import Path

from PIL import Image

STATIC = Path(__file__).parent / "_static"
LIMIT = 300_000


def shrink(source: Path, target: Path) -> None:
    """Fewer colours first, then fewer pixels, until the file is small enough."""
    picture = Image.open(source).convert("RGB")
    width, height = picture.size
    for share in (1.0, 0.85, 0.7, 0.6, 0.5, 0.4):
        smaller = picture.resize((round(width * share), round(height * share)), Image.Resampling.LANCZOS)
        smaller.quantize(256).save(target, optimize=True)
        if target.stat().st_size < LIMIT:
            return
    raise SystemExit(f"{source} stays above {LIMIT} bytes")


def main() -> None:
    run_dir = Path(sys.argv[1])
    for name in ("loss_curves.png", "map.png", "clusters.png"):
        shrink(run_dir / name, STATIC / name)
    shutil.copy(run_dir / "table.txt", STATIC / "table.txt")


if __name__ == "__main__":
    main()
