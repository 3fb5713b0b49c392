"""The style that the figures of all reports share."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#3d7cc9", "#d98a1f", "#2f9e57", "#8257c7", "#c0392b", "#7b8794")
GREY = COLOURS[5]
WIDTH = 5.4
"""Inches of a figure: its text has 9 pixels on a page of 420 pixels, and 15 where it is widest."""
_TEXT, _LINE = "#1d2733", "#d9dfe6"
# what figures are drawn in within :func:`page_style` -> the variable of the page's style sheet
PAGE_COLOURS = {_TEXT: "--text", _LINE: "--line"}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Make a figure of WIDTH x `height` inches with one plot in it."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a figure on white, as PNG or SVG by the suffix; returns the path."""
    FigureCanvasAgg(figure)  # without it a Figure cannot be written in some versions
    # the same bytes every time
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=130, facecolor="white", metadata=metadata)
    return path


@contextmanager
def page_style() -> Iterator[None]:
    """Within it figures are drawn in colours that a page can replace by its own."""
    keys = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    colours: dict[Any, Any] = {**dict.fromkeys(keys, _TEXT)}
    colours |= {"axes.edgecolor": _LINE, "grid.color": _LINE}
    with rc_context({**colours, "axes.axisbelow": True, "svg.hashsalt": "fpn_plugin"}):
        yield
