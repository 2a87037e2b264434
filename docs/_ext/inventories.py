"""Links to Python's and PyTorch's documentation without a download.

Intersphinx fetches each project's whole inventory at every build, which fails without a network. The signatures here use a
handful of names, so their inventories are written down in this file instead.
"""

import zlib
from pathlib import Path

SITES = {
    "python": ("https://docs.python.org/3/", "3"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "stable"),
    "numpy": ("https://numpy.org/doc/stable/", "stable"),
}

CLASSES = {
    "python": {
        **dict.fromkeys(("bool", "float", "int"), "library/functions.html"),
        **dict.fromkeys(("dict", "list", "set", "str", "tuple"), "library/stdtypes.html"),
        **dict.fromkeys(
            ("FileNotFoundError", "ImportError", "IndexError", "RuntimeError", "TypeError", "ValueError"),
            "library/exceptions.html",
        ),
        **{
            f"collections.abc.{name}": "library/collections.abc.html"
            for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
        },
        "argparse.Namespace": "library/argparse.html",
        "object": "library/functions.html",
        "os.PathLike": "library/os.html",
        "pathlib.Path": "library/pathlib.html",
        "typing.Any": "library/typing.html",
        "None": "library/constants.html",
    },
    "torch": {
        "torch.Tensor": "tensors.html",
        "torch.device": "tensor_attributes.html",
        "torch.dtype": "tensor_attributes.html",
        "torch.nn.Module": "generated/torch.nn.Module.html",
        "torch.nn.Sequential": "generated/torch.nn.Sequential.html",
        "torch.optim.Optimizer": "optim.html",
    },
    "numpy": {"numpy.ndarray": "reference/generated/numpy.ndarray.html"},
}

# autodoc prints the module a base class is defined in, which is not where it is documented.
ALIASES = {
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.nn.modules.container.Sequential": "torch.nn.Sequential",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}


def role(name: str) -> str:
    if name.endswith("Error"):
        return "py:exception"
    return "py:data" if name in ("typing.Any", "None") else "py:class"


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write the inventories into ``folder``; return the ``intersphinx_mapping`` that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (site, version) in SITES.items():
        lines = [f"{name} {role(name)} 1 {page}#{name} -" for name, page in CLASSES[project].items()]
        for alias, name in ALIASES.items():
            if name in CLASSES[project]:
                lines.append(f"{alias} {role(name)} 1 {CLASSES[project][name]}#{name} {name}")
        header = (
            "# Sphinx inventory version 2\n"
            f"# Project: {project}\n# Version: {version}\n"
            "# The remainder of this file is compressed using zlib.\n"
        )
        path = folder / f"{project}.inv"
        path.write_bytes(header.encode() + zlib.compress("\n".join(lines).encode() + b"\n"))
        mapping[project] = (site, str(path))
    return mapping
