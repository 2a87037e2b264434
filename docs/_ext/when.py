"""The lines "Use it when", "Not when" and "Related" of a docstring, each on a line of its own in the page."""

import re
from typing import Any

from sphinx.application import Sphinx

START = re.compile(r"^(\s*)(?:\*\*)?(Use it when|Not when|Related):(?:\*\*)? ")


def as_line_block(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    inside, result = False, []
    for line in lines:
        begins = START.match(line)
        inside = begins is not None or (inside and bool(line.strip()))
        if begins is not None:
            line = f"{begins[1]}| **{begins[2]}:** {line[begins.end() :]}"
        elif inside:
            line = f"  {line}"  # continues the line block's line
        result.append(line)
    lines[:] = result


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", as_line_block)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
