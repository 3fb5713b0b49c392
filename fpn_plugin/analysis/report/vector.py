"""Pictures as a part of a page: sharp at any size, and in its colours, light or dark."""

from __future__ import annotations

import html
import io
import re
from contextlib import contextmanager
from typing import Any, Iterator

from matplotlib import rc_context
from matplotlib.figure import Figure

# what figures are drawn in, and what that is on a page: names of :func:`html_page`'s style
TEXT, LINE = "#1d2733", "#d9dfe6"
_ON_PAGE = {TEXT: "var(--text)", LINE: "var(--line)"}


@contextmanager
def page_look() -> Iterator[None]:
    """Within it figures are drawn in colours that a page can make its own."""
    keys = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    look: dict[Any, Any] = {**dict.fromkeys(keys, TEXT), "axes.edgecolor": LINE, "grid.color": LINE}
    with rc_context({**look, "axes.axisbelow": True, "svg.hashsalt": "fpn_plugin"}):
        yield


def html_svg(title: str, figure: Figure) -> str:
    """A figure that was drawn within :func:`page_look`, with its title."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, name in _ON_PAGE.items():
        svg = svg.replace(colour, name)
    text = html.escape(title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    return f"<figure><figcaption>{text}</figcaption>{svg}</figure>"
