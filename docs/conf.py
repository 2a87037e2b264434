"""How the documentation is built: ``sphinx-build -W --keep-going -b html docs docs/_build/html``. Needs no network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import inventories  # noqa: E402

from protoclip_losses import __version__  # noqa: E402

project = "protoclip-losses"
author = "the protoclip-losses authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "changelog",
    "gallery",
    "svgmath",
    "when",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"protoclip-losses {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "svg"
html_show_sphinx = False
viewcode_line_numbers = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autosummary_generate = False  # tables of names that a page documents itself
autodoc_mock_imports = [  # the pages of the hosts are built where no host is installed
    "accelerate",
    "datasets",
    "lightning",
    "safetensors",
    "sentence_transformers",
    "transformers",
]
autodoc_inherit_docstrings = False  # torch.nn.Module's docstrings would appear under methods that we override
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # the text of a default, where its value has no readable form
maximum_signature_line_length = 110
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

intersphinx_mapping = inventories.write(HERE / "_build" / "inventories")

nitpicky = True  # every name in a signature or a text has to lead somewhere; nothing is excepted

# Examples in docstrings are written from inside their module, as pytest's --doctest-modules runs them.
# What the pages show is not deprecated.
doctest_global_setup = f"""
import pathlib
import warnings
import torch
warnings.filterwarnings("error", ".*is deprecated and goes after", FutureWarning)
REPOSITORY = pathlib.Path({str(HERE.parent)!r})
torch.manual_seed(0)
from protoclip_losses import *
from protoclip_losses.distributed import even_batches
from protoclip_losses.functional import *
from protoclip_losses.metrics import *
from protoclip_losses.plots import *
from protoclip_losses.teachers import *
"""


def readable_factories(app, what, name, obj, options, signature, returns):  # type: ignore[no-untyped-def]
    """A signature with "<factory>", the default of a dataclass, is not Python: Sphinx would print it as it stands, unlinked."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-signature", readable_factories)
