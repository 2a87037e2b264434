"""The codebases ProtoLoss is dropped into: one file per host, which imports its host when it is imported itself."""

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a host's module, or say what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this integration needs {module}, which cannot be imported ({error}): pip install 'protoclip-losses[{extra}]'"
        ) from error
