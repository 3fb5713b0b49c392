"""One HTML page that needs nothing beside it: no script, no request.

The HTML is in the template beside this file, which escapes all text. Each function returns a piece
of a page, for :func:`html_page`.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any, Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from fpn_plugin.report.figures import PAGE_COLOURS
from fpn_plugin.report.tables import Table

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)
_MACROS: Any = _ENVIRONMENT.get_template("page.html").module


def html_page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page of HTML `parts` under a heading.

    Args:
        title: plain text.
        style: further CSS.
    """
    return str(_MACROS.page(title, [Markup(part) for part in parts], Markup(style)))


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is a CSS class such as "bad" (red) or "good" (green)."""
    return str(_MACROS.paragraph(text, kind))


def html_table(table: Table) -> str:
    """A table with its title above and its note below."""
    return str(_MACROS.table(table))


def html_figure(title: str, path: Path) -> str:
    """A picture with its title, its bytes in the page; PNG or JPEG by the path's extension."""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    image = _MACROS.image(title, f"data:image/{kind};base64,{data}")
    return str(_MACROS.figure(title, image))


def html_svg(title: str, figure: Figure) -> str:
    """A figure that was drawn within :func:`page_style`, with its title.

    It is sharp at any size, and takes the page's colours, light or dark.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return str(_MACROS.figure(title, Markup(svg)))
