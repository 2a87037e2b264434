"""Which folder of the package may import from which, and how large its parts may grow: read from the source."""

import ast
from pathlib import Path

import pytest

import protoclip_losses

PACKAGE = Path(protoclip_losses.__file__).parent
# From the ground up: a layer imports from those before it and from SHARED. A layer is a folder or a file at the root.
LAYERS = (
    "_collectives",
    "distributed",
    "kernels",
    "functional",
    "clustering",
    "teachers",
    "episodes",
    "prototypes",
    "losses",
    "integrations",
)
SHARED = ("_checks", "_dtypes", "_version")
COMMANDS = ("cluster",)
TOP = ("heads", "metrics", "plots", *COMMANDS)  # import anything but integrations; integrations and commands import them
ROOT = ("__init__", "_deprecated")
MAX_LINES, MAX_FILES_AT_ROOT = 250, 9


def modules_in(package):
    """{dotted name under the package: file}; the package itself is "", a folder has the name of its __init__."""
    files = {file.relative_to(package).with_suffix("").parts: file for file in package.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for parts, file in files.items()}


def imported(tree, module, is_package, modules, package="protoclip_losses"):
    """Modules of the package that a syntax tree imports, wherever the import stands and however it is written."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = [package, *filter(None, module.split("."))]
            base = own[: len(own) - node.level + is_package] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{source}.{name.name}" for name in node.names}
    inside = [name.split(".")[1:] for name in found if name.split(".")[0] == package]
    # The last part may be a name in a module: the longest beginning that is a module is what is imported.
    return {next(".".join(n[:i]) for i in range(len(n), -1, -1) if ".".join(n[:i]) in modules) for n in inside}


MODULES = modules_in(PACKAGE)
IMPORTS = {
    module: imported(ast.parse(file.read_text()), module, file.name == "__init__.py", MODULES) for module, file in MODULES.items()
}


def layer(module):
    return module.split(".")[0] or "__init__"


def may_import(one, other):
    """Whether layer ``one`` may import from layer ``other``."""
    if one == other or other in SHARED:
        return True
    if one in SHARED or one == "_deprecated":
        return False
    if one == "__init__":
        return other != "integrations"
    if other in TOP:
        return one == "integrations" or one in COMMANDS
    if one in TOP:
        return other != "integrations"
    return other in LAYERS and LAYERS.index(other) < LAYERS.index(one)


def reachable(module, imports):
    seen, ahead = set(), [module]
    while ahead:
        new = imports[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def circles(imports):
    """Sets of modules that import each other, directly or through others."""
    reach = {module: reachable(module, imports) for module in imports}
    return {frozenset(m for m in reach[module] if module in reach[m]) for module in imports if module in reach[module]}


def test_every_file_and_folder_is_in_a_layer():
    assert {layer(module) for module in MODULES} <= {*LAYERS, *SHARED, *TOP, *ROOT}


@pytest.mark.parametrize("name", sorted({layer(module) for module in MODULES}))
def test_a_layer_imports_only_from_those_below_it(name):
    against = [
        f"{module} imports {other or 'the root'}"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if layer(module) == name and not may_import(name, layer(other))
    ]
    assert against == []


def test_no_modules_import_each_other():
    assert [" <-> ".join(sorted(circle)) for circle in circles(IMPORTS)] == []


def test_few_files_lie_at_the_root():
    files = sorted(file.name for file in PACKAGE.iterdir() if file.is_file())
    assert len(files) <= MAX_FILES_AT_ROOT, files


def test_no_file_is_long():
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in MODULES.values()}
    assert {name: n for name, n in sorted(lines.items()) if n > MAX_LINES} == {}


def test_nothing_is_called_utils():
    assert [module for module in MODULES if "utils" in (part.strip("_") for part in module.split("."))] == []


@pytest.mark.parametrize(
    ("module", "code", "others"),
    [
        ("losses.terms", "from .proto_loss import ProtoLoss", {"losses.proto_loss"}),
        ("losses.terms", "if TYPE_CHECKING:\n    from .proto_loss import ProtoLoss", {"losses.proto_loss"}),
        ("losses.terms", "def f():\n    from ..heads import ProjectionHead", {"heads"}),
        ("losses.terms", "from .. import heads, ProtoLoss", {"heads", ""}),
        ("losses.terms", "from . import terms, InfoNCE", {"losses.terms", "losses"}),
        ("losses", "from .terms import Term", {"losses.terms"}),
        ("losses", "from ..heads import ProjectionHead", {"heads"}),
        ("losses.deep.file", "from ...heads import ProjectionHead", {"heads"}),
        ("", "from . import heads", {"heads"}),
        ("heads", "import protoclip_losses.losses.terms as t, torch", {"losses.terms"}),
        ("heads", "from protoclip_losses.losses import terms, ProtoLoss", {"losses.terms", "losses"}),
        ("heads", "import protoclip_losses", {""}),
        ("heads", "from torch import nn\nimport protoclip_losses_of_others", set()),
    ],
)
def test_an_import_is_seen_in_every_form(module, code, others):
    modules = {"", "heads", "losses", "losses.terms", "losses.proto_loss", "losses.deep", "losses.deep.file"}
    assert imported(ast.parse(code), module, module in ("", "losses"), modules) == others


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}}) == {frozenset("bc"), frozenset("d")}
