"""One figure per image: the truth if it is known, the detections by level, a histogram, heat maps.

Lengths are in inches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fpn_plugin.analysis.visualize.heat import LEFT, draw_heat, make_grid
from fpn_plugin.analysis.visualize.histogram import draw_histogram
from fpn_plugin.analysis.visualize.look import Seen
from fpn_plugin.analysis.visualize.objects import Thing, annotated, detected, draw_things
from fpn_plugin.analysis.visualize.rows import Row
from fpn_plugin.analysis.visualize.style import (
    FONT,
    INK,
    SMALL,
    TEXT,
    TITLE,
    level_colour,
    level_name,
)

_WIDTH, _MARGIN, _PANEL = 12.0, 0.15, 4.6  # _PANEL: the most that a photo is high
_HISTOGRAM, _LOW = 3.0, 2.2  # the least that it is wide, and high
_TRUE = "#ffffff"


@dataclass(frozen=True)
class Shown:
    """What of an image is shown: objects, with their levels.

    Attributes:
        truth: None if nobody knows.
    """

    found: Sequence[Thing]
    levels: Sequence[int | None]
    truth: Sequence[Thing] | None


def choose(seen: Seen, names: Sequence[str], score: float) -> Shown:
    """The detections with at least this score, and the truth."""
    chosen = (seen.found.scores >= score).nonzero()[:, 0]
    levels = seen.levels()
    size = seen.pixels.shape[:2]
    return Shown(
        detected(seen.found[chosen], names),
        [None if levels is None else levels[i] for i in chosen.tolist()],
        None if seen.truth is None else annotated(seen.truth, names, size),
    )


def draw_image(seen: Seen, shown: Shown, rows: Sequence[Row], score: float) -> Figure:
    """The figure of an image.

    Args:
        rows: of heat maps.
        score: the lowest of the detections that are shown.
    """
    height, width = seen.pixels.shape[:2]
    grid = make_grid(rows, _WIDTH, height / width)
    photos = 1 if shown.truth is None else 2
    room = (_WIDTH - _HISTOGRAM - 0.8) / photos - 2 * _MARGIN
    panel = min(room, _PANEL * width / height, 5.6)
    with matplotlib.rc_context({"font.family": FONT}):
        top = max(panel * height / width, _LOW)
        figure = Figure(figsize=(_WIDTH, grid.total + top + 0.95), facecolor="white")
        FigureCanvasAgg(figure)
        _draw_top(figure, seen, shown, panel, (grid.total + 0.4, top), score)
        draw_heat(figure, grid, rows, seen)
        text = "Root mean square over the channels; one scale per row, 1st to 99th percentile"
        figure.text(LEFT / _WIDTH, (grid.total + 0.03) / figure.get_figheight(), text, **_soft())
    return figure


def _draw_top(
    figure: Figure,
    seen: Seen,
    shown: Shown,
    panel: float,
    place: tuple[float, float],
    score: float,
) -> None:
    """Photos and histogram; `panel` is how wide a photo is, `place` is bottom and height of all."""
    width, height = figure.get_size_inches()
    bottom, top = place
    photo = panel * seen.pixels.shape[0] / seen.pixels.shape[1]
    left = _MARGIN
    title: dict[str, Any] = {"fontsize": TITLE, "color": INK, "loc": "left"}

    def panel_axes(wide: float, high: float) -> Axes:
        below = bottom + top - high
        return figure.add_axes((left / width, below / height, wide / width, high / height))

    if shown.truth is not None:
        axes = panel_axes(panel, photo)
        draw_things(axes, seen.pixels, shown.truth, [_TRUE] * len(shown.truth))
        axes.set_title(f"{len(shown.truth)} in the ground truth", **title)
        left += panel + _MARGIN
    axes = panel_axes(panel, photo)
    draw_things(axes, seen.pixels, shown.found, [level_colour(level) for level in shown.levels])
    axes.set_title(f"{len(shown.found)} found with score ≥ {score:g}", **title)
    if any(level is not None for level in shown.levels):
        _draw_legend(axes, shown)
    left += panel + 0.65
    axes = panel_axes(width - left - _MARGIN, top - 0.42)
    _draw_sizes(axes, seen, shown)
    axes.set_title("by size and level", **title)
    figure.text(_MARGIN / width, 1 - 0.2 / height, seen.name, fontsize=TITLE, weight="bold")


def _draw_sizes(axes: Axes, seen: Seen, shown: Shown) -> None:
    true = None if shown.truth is None else [thing.size for thing in shown.truth]
    zoom = (seen.size[0] * seen.size[1] / seen.pixels[:, :, 0].size) ** 0.5
    draw_histogram(axes, [thing.size for thing in shown.found], shown.levels, true, zoom)


def _draw_legend(axes: Axes, shown: Shown) -> None:
    levels = sorted({level for level in shown.levels if level is not None})
    handles = [Patch(color=level_colour(level), label=level_name(level)) for level in levels]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=len(levels),
        fontsize=SMALL,
        frameon=False,
        borderpad=0,
        columnspacing=1.0,
        handlelength=1.2,
    )


def _soft() -> dict[str, Any]:
    return {"fontsize": TEXT, "color": "#5b6875"}


def save_png(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure; the folder exists."""
    figure.savefig(path, dpi=dpi)


def as_pixels(figure: Figure, dpi: int) -> np.ndarray:
    """A figure as `(H, W, 3)`, 0 to 255."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
