"""Whether a checkpoint of Trainer is one of ours."""

from pathlib import Path

from .model import saved_heads


def check_checkpoint(folder: str | Path) -> None:
    """Raise ValueError for a checkpoint of a plain Trainer, whose optimizer knows of no heads."""
    if (Path(folder) / "optimizer.pt").exists() and saved_heads(folder) == {}:
        raise ValueError(
            f"{folder} must be a checkpoint of ProtoCLIPTrainer, got one without heads, whose optimizer state does not fit: "
            f"begin with its model, from_pretrained({str(folder)!r}), and do not resume"
        )
