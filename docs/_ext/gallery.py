"""The directive ``gallery``: a script of docs/gallery and the picture that it draws, run at every build.

A script writes ``NAME.png`` into its working directory. One that fails, or draws nothing, fails the build.
"""

import contextlib
import os
import runpy
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

PICTURES = Path("_build", "gallery")  # under the sources, where Sphinx looks for pictures


@contextlib.contextmanager
def inside(folder: Path) -> Any:
    """contextlib.chdir of Python 3.11."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def draw(app: Sphinx) -> None:
    folder = Path(app.srcdir) / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted((Path(app.srcdir) / "gallery").glob("*.py")):
        picture = folder / f"{script.stem}.png"
        picture.unlink(missing_ok=True)
        try:
            with inside(folder):
                runpy.run_path(str(script))
        except Exception as error:
            raise ExtensionError(f"{script} failed: {error!r}", error) from error
        if not picture.exists():
            raise ExtensionError(f"{script} must write {picture.name}, and did not")


class Gallery(SphinxDirective):
    required_arguments = 1
    option_spec = {"alt": str}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        picture = f".. image:: {PICTURES / name}.png\n   :alt: {self.options['alt']}"
        return self.parse_text_to_nodes(f".. literalinclude:: gallery/{name}.py\n\n{picture}")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", draw)
    app.add_directive("gallery", Gallery)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
