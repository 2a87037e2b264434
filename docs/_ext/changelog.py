"""The directive ``changelog``: CHANGELOG.md as a part of a page, by the few rules of Markdown that it keeps to.

A parser of Markdown would be one more package to build the documentation with.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

CODE = re.compile(r"(`+)(.+?)\1", re.S)
LINK = re.compile(r"\[([^\]]+)\]\((\S+?)\)")


def as_rst(markdown: str) -> list[str]:
    """Headings of level 2 and 3, lists, paragraphs, code, links and bold; the title of level 1 is that of the page."""
    lines = []
    for line in in_line(markdown).splitlines():
        heading = re.match(r"(#+) (.+)", line)
        if heading is None:
            lines.append(line)
        elif len(heading[1]) > 1:
            title = heading[2].replace("[", "").replace("]", "")
            lines += [title, {2: "-", 3: "~"}[len(heading[1])] * len(title)]
    return lines


def in_line(markdown: str) -> str:
    """Markup within lines; code may go on in the next one, and nothing in it is markup."""
    text, at = "", 0
    for code in CODE.finditer(markdown):
        text += escape(markdown[at : code.start()]) + f"``{code[2]}``"
        at = code.end()
        text += "\\ " if markdown[at : at + 1].isalnum() else ""  # reST ends code only before a break
    return text + escape(markdown[at:])


def escape(text: str) -> str:
    """Links and bold as reST has them; a single mark of reST that is none in Markdown is itself."""
    text = re.sub(r"(?<!\*)\*(?!\*)|[|_]", lambda mark: f"\\{mark[0]}", text)
    return LINK.sub(lambda link: f"`{link[1]} <{link[2]}>`__", text)


class Changelog(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        self.state_machine.insert_input(as_rst(Path(path).read_text(encoding="utf-8")), path)
        return []


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("changelog", Changelog)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
