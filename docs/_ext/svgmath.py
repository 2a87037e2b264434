"""Formulas as SVG drawings in the page, made at build time by ziamath: nothing for the reader to fetch or to install.

Sphinx's own renderers need LaTeX on the builder's machine or MathJax from a network on the reader's.
"""

import re
from typing import Any
from xml.etree import ElementTree

import latex2mathml.converter
import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

SIZE = 16  # of the drawing's own units; the page scales them by its font size


def draw(tex: str, inline: bool, node: nodes.Node) -> str:
    # Brackets stretch by themselves, and "\mathbb E" is valid LaTeX that the converter takes for "\mathbb" and "E".
    tex = re.sub(r"\\[bB]igg?[lrm]?(?![A-Za-z])", "", tex)
    tex = re.sub(r"\\(mathbb|mathcal|mathrm) +(\w)", r"\\\1{\2}", tex)
    if "\\" in latex2mathml.converter.convert(tex):  # an unknown command is passed through as text, without an error
        logger.warning("formula has a command that cannot be drawn: %s", tex, location=node)
    formula = ziamath.Latex(tex, size=SIZE, color="currentColor", inline=inline)
    svg = formula.svgxml()
    width, height = (float(svg.attrib.pop(name)) / SIZE for name in ("width", "height"))
    top = float(svg.attrib["viewBox"].split()[1])
    below = height + top / SIZE  # the baseline is at 0
    svg.attrib["style"] = f"width: {width:.3f}em; height: {height:.3f}em; vertical-align: {-below:.3f}em"
    svg.attrib["role"] = "img"
    svg.attrib["aria-label"] = tex
    return ElementTree.tostring(svg, encoding="unicode")


def keep_marks(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give a formula in a text the mark that follows it: a browser would begin a line with "." or ")" after a drawing."""
    if app.builder.format != "html":
        return
    for formula in list(doctree.findall(nodes.math)):
        text = formula.next_node(descend=False, siblings=True)
        if isinstance(text, nodes.Text) and (mark := re.match(r"[.,:;)]+", text)):
            formula["mark"] = mark[0]
            formula.parent.replace(text, nodes.Text(text[mark.end() :]))


def visit_math(self: Any, node: nodes.math) -> None:
    drawing = draw(node.astext(), True, node)
    if "mark" in node:
        drawing = f'<span style="white-space: nowrap">{drawing}{node["mark"]}</span>'
    self.body.append(drawing)
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(draw(" ".join(node.astext().split()), False, node))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("svg", inline_renderers=(visit_math, None), block_renderers=(visit_displaymath, None))
    app.connect("doctree-resolved", keep_marks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
