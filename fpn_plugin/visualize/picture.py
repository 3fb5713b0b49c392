"""One figure per image: the truth if it is known, the detections by level, a histogram of sizes,
and heat maps: the strength of the pyramid's maps over the image, a grid of stages and levels.

Lengths are in inches, from the figure's lower left corner.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Sequence

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fpn_plugin.visualize.images import InspectedImage
from fpn_plugin.visualize.maps import Cell, Row
from fpn_plugin.visualize.objects import (
    ImageObject,
    draw_objects,
    highest_score,
    objects_of_annotations,
    objects_of_instances,
)

# bright, as they are drawn on photos; neighbouring levels are far apart
_LEVEL_COLOURS = dict(
    zip(range(2, 8), ("#ffd400", "#ff4fa3", "#00c8ff", "#ff7a1a", "#7ee22b", "#b98cff"))
)
_OTHER_COLOURS = ("#3dffb5", "#ff3b3b", "#5a8cff")
_UNKNOWN_COLOUR, _TRUTH_COLOUR = "#c9d1d9", "#ffffff"
_INK, _SOFT, _LINE = "#1d2733", "#5b6875", "#d9dfe6"
_TITLE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 10.0, 8.0, 7.0  # in points
_FONT = "DejaVu Sans"

_WIDTH, _MARGIN = 12.0, 0.15
_MOST_PHOTO_WIDTH, _MOST_PHOTO_HEIGHT = 5.6, 4.6
_LEAST_HISTOGRAM_WIDTH, _LEAST_TOP_HEIGHT = 3.0, 2.2
# of the heat maps: room for titles and colour bars, and the largest cell
_LEFT, _RIGHT, _GAP, _CAPTION, _HEADING, _MOST_CELL = 0.62, 0.62, 0.08, 0.2, 0.3, 2.6
_HEAT_COLOURS = "magma"
_HEAT_ALPHA = 0.8  # of the heat on the photo
_PERCENTILES = (1.0, 99.0)  # a few wild pixels must not set the scale

Level = int | None  # None: unknown


def level_colour(level: Level) -> str:
    """The colour of a level."""
    if level is None:
        return _UNKNOWN_COLOUR
    return _LEVEL_COLOURS.get(level, _OTHER_COLOURS[level % len(_OTHER_COLOURS)])


def level_name(level: Level) -> str:
    """What a legend calls a level."""
    return "level unknown" if level is None else f"level {level} (stride {2**level})"


@dataclass(frozen=True)
class Selection:
    """The objects of an image that are shown.

    Attributes:
        levels: of the detections.
        truth: None if it is unknown.
    """

    detections: Sequence[ImageObject]
    levels: Sequence[Level]
    truth: Sequence[ImageObject] | None


def select_objects(
    image: InspectedImage,
    names: Sequence[str],
    score: float,
    skeleton: Sequence[tuple[int, int]] = (),
) -> Selection:
    """The detections with at least this score, and the truth.

    Args:
        names: of the classes.
        skeleton: pairs of indices of key points to join.
    """
    selected = (image.detections.scores >= score).nonzero()[:, 0]
    levels = image.levels()
    annotations = image.annotations
    return Selection(
        objects_of_instances(image.detections[selected], names, skeleton),
        [None if levels is None else levels[i] for i in selected.tolist()],
        None if annotations is None else objects_of_annotations(annotations, names, skeleton),
    )


def draw_image(
    image: InspectedImage, objects: Selection, rows: Sequence[Row], score: float
) -> Figure:
    """The figure of an image.

    Args:
        rows: of heat maps.
        score: the lowest of the detections that are shown.
    """
    height, width = image.pixels.shape[:2]
    grid = make_grid(rows, _WIDTH, height / width)
    # the photos share what the histogram leaves of the width
    photos = 1 if objects.truth is None else 2
    room = (_WIDTH - _LEAST_HISTOGRAM_WIDTH - 0.8) / photos - 2 * _MARGIN
    photo_width = min(room, _MOST_PHOTO_HEIGHT * width / height, _MOST_PHOTO_WIDTH)
    top = max(photo_width * height / width, _LEAST_TOP_HEIGHT)
    with matplotlib.rc_context({"font.family": _FONT}):
        figure = Figure(figsize=(_WIDTH, grid.total + top + 0.95), facecolor="white")
        FigureCanvasAgg(figure)
        _draw_top(figure, image, objects, photo_width, (grid.total + 0.4, top), score)
        _draw_heat(figure, grid, rows, image)
        text = "Root mean square over the channels; one scale per row, 1st to 99th percentile"
        x, y = _LEFT / _WIDTH, (grid.total + 0.03) / figure.get_figheight()
        figure.text(x, y, text, fontsize=_TEXT_SIZE, color=_SOFT)
    return figure


def as_pixels(figure: Figure, dpi: float) -> np.ndarray:
    """A figure as `(H, W, 3)`, 0 to 255."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _draw_top(
    figure: Figure,
    image: InspectedImage,
    objects: Selection,
    photo_width: float,
    place: tuple[float, float],
    score: float,
) -> None:
    """Photos and histogram; `place` is the bottom and the height of all."""
    width, height = figure.get_size_inches()
    bottom, top = place
    left = _MARGIN
    title: dict[str, Any] = {"fontsize": _TITLE_SIZE, "color": _INK, "loc": "left"}

    def add_axes(wide: float, high: float) -> Axes:
        below = bottom + top - high
        return figure.add_axes((left / width, below / height, wide / width, high / height))

    def draw_photo(shown: Sequence[ImageObject], colours: Sequence[str], text: str) -> Axes:
        axes = add_axes(photo_width, photo_width * image.pixels.shape[0] / image.pixels.shape[1])
        draw_objects(axes, image.pixels, shown, colours)
        axes.set_title(text, **title)
        return axes

    truth = objects.truth
    if truth is not None:
        draw_photo(truth, [_TRUTH_COLOUR] * len(truth), f"{len(truth)} in the ground truth")
        left += photo_width + _MARGIN
    colours = [level_colour(level) for level in objects.levels]
    text = f"{len(objects.detections)} found with score ≥ {score:g}"
    if not objects.detections:
        text += f"; {highest_score(image.detections.scores.tolist())}"
    axes = draw_photo(objects.detections, colours, text)
    if any(level is not None for level in objects.levels):
        _draw_legend(axes, objects.levels)
    left += photo_width + 0.65
    axes = add_axes(width - left - _MARGIN, top - 0.42)
    zoom = (image.size[0] * image.size[1] / image.pixels[:, :, 0].size) ** 0.5
    sizes = [obj.size for obj in objects.detections]
    true_sizes = None if truth is None else [obj.size for obj in truth]
    draw_histogram(axes, sizes, objects.levels, true_sizes, zoom)
    axes.set_title("by size and level", **title)
    figure.text(_MARGIN / width, 1 - 0.2 / height, image.name, fontsize=_TITLE_SIZE, weight="bold")


def _draw_legend(axes: Axes, levels: Sequence[Level]) -> None:
    """The colours of the levels, below a photo."""
    known = sorted({level for level in levels if level is not None})
    axes.legend(
        handles=[Patch(color=level_colour(level), label=level_name(level)) for level in known],
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=len(known),
        fontsize=_SMALL_SIZE,
        frameon=False,
        borderpad=0,
        columnspacing=1.0,
        handlelength=1.2,
    )


# Objects by size and by level. The size is the square root of the box's area, in pixels.


def octave(size: float) -> int:
    """Sizes from `2**k` to below `2**(k + 1)` are in octave k; below a pixel in octave 0."""
    return math.floor(math.log2(size)) if size >= 1 else 0


def count_sizes(sizes: Sequence[float], levels: Sequence[Level]) -> dict[Level, Counter[int]]:
    """How many objects of each level are in each octave; levels ascending, unknown ones last."""
    counts: dict[Level, Counter[int]] = {}
    for level in sorted(set(levels), key=lambda level: (level is None, level or 0)):
        counts[level] = Counter(octave(size) for size, at in zip(sizes, levels) if at == level)
    return counts


def draw_histogram(
    axes: Axes,
    sizes: Sequence[float],
    levels: Sequence[Level],
    true_sizes: Sequence[float] | None,
    zoom: float = 1.0,
) -> None:
    """Detections as bars, stacked by level; the truth as an outline.

    Args:
        sizes: of the detections.
        levels: of the detections.
        true_sizes: of the true objects; None if they are unknown.
        zoom: by how much the image was enlarged before the model saw it, which decides the levels.
    """
    counts = count_sizes(sizes, levels)
    truth = Counter(map(octave, true_sizes or []))
    octaves = {octave for counter in (*counts.values(), truth) for octave in counter} or {4, 5}
    places = range(min(octaves), max(octaves) + 1)
    edges = [place - 0.5 for place in (*places, places[-1] + 1)]
    floor: np.ndarray = np.zeros(len(places), dtype=int)  # where the next level's bars begin
    style: dict[str, Any] = {"edgecolor": _INK, "linewidth": 0.5}
    for level, counter in counts.items():
        heights = np.array([counter[place] for place in places])
        colour, label = level_colour(level), level_name(level)
        axes.bar(places, heights, 0.8, floor, label=label, facecolor=colour, **style)
        floor += heights
    if true_sizes is not None:
        style = {"color": _INK, "linewidth": 1.4, "linestyle": (0, (4, 2)), "zorder": 3}
        axes.stairs([truth[place] for place in places], edges, label="ground truth", **style)
    axes.set_xticks(edges, [str(2**place) for place in (*places, places[-1] + 1)])
    axes.set_xlim(edges[0] - 0.1, edges[-1] + 0.1)
    entries = len(counts) + (true_sizes is not None)
    highest = max([1, *floor.tolist(), *truth.values()])
    axes.set_ylim(0, (1.05 + 0.09 * entries) * highest)  # with room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=_SMALL_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    note = "" if abs(zoom - 1) < 0.005 else f" (the model saw it × {zoom:.2g})"
    axes.set_xlabel(f"√(box area), pixels of the image{note}", fontsize=_TEXT_SIZE)
    axes.set_ylabel("objects", fontsize=_TEXT_SIZE)
    if entries:
        axes.legend(loc="upper right", fontsize=_SMALL_SIZE, frameon=False, borderaxespad=0)


# Heat maps.


@dataclass(frozen=True)
class HeatGrid:
    """The cells of the heat maps.

    Attributes:
        levels: of the columns.
        width: of a cell.
        height: of a cell.
        rows: how many there are.
    """

    levels: Sequence[int]
    width: float
    height: float
    rows: int

    @property
    def total(self) -> float:
        """The height of all rows, with what is above them."""
        return _HEADING + self.rows * (self.height + _CAPTION + _GAP)

    def left(self, column: int) -> float:
        """The left edge of a column."""
        return _LEFT + column * (self.width + _GAP)

    def bottom(self, row: int) -> float:
        """The lower edge of a row; row 0 is on top."""
        return (self.rows - 1 - row) * (self.height + _CAPTION + _GAP) + _GAP


def make_grid(rows: Sequence[Row], width: float, aspect: float) -> HeatGrid:
    """A grid for these rows.

    Args:
        width: of all of it.
        aspect: height of the image by its width.
    """
    levels = sorted({level for row in rows for level in row.cells})
    room = (width - _LEFT - _RIGHT) / len(levels) - _GAP
    cell_width = min(room, _MOST_CELL, _MOST_CELL / aspect)
    return HeatGrid(levels, cell_width, cell_width * aspect, len(rows))


def _draw_heat(figure: Figure, grid: HeatGrid, rows: Sequence[Row], image: InspectedImage) -> None:
    """Draw the rows at the bottom of a figure."""
    width, height = figure.get_size_inches()
    grey = image.pixels.mean(axis=2) / 255
    style: dict[str, Any] = {"fontsize": _TEXT_SIZE, "color": _INK, "ha": "center"}
    for number, row in enumerate(rows):
        bottom, scale = grid.bottom(number), _heat_scale(row, image)
        middle = (bottom + grid.height / 2) / height
        turned: dict[str, Any] = {**style, "rotation": 90, "va": "center", "linespacing": 1.1}
        figure.text(0.3 / width, middle, row.title.replace(", ", ",\n"), **turned)
        for column, level in enumerate(grid.levels):
            left = grid.left(column)
            place = (left / width, bottom / height, grid.width / width, grid.height / height)
            _draw_cell(figure.add_axes(place), row.cells.get(level), level, grey, scale, image)
            if number == 0:
                x, y = left + grid.width / 2, bottom + grid.height + _CAPTION + 0.06
                figure.text(x / width, y / height, f"level {level}, stride {2**level}", **style)
        left = grid.left(len(grid.levels)) + 0.02
        place = (left / width, bottom / height, 0.1 / width, grid.height / height)
        mappable = ScalarMappable(scale, colormaps[_HEAT_COLOURS])
        bar = figure.colorbar(mappable, cax=figure.add_axes(place))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=_SMALL_SIZE, length=2, color=_SOFT)
        bar.ax.locator_params(nbins=4)


def crop_padding(cell: Cell, level: int, size: tuple[int, int]) -> np.ndarray:
    """A map without the pixels that only padding gave: `(h, w)`.

    Args:
        size: height and width that the model saw the image at.
    """
    rows, columns = (-(-side // 2**level) for side in size)
    return cell.strength[:rows, :columns].numpy()


def _heat_scale(row: Row, image: InspectedImage) -> Normalize:
    maps = [crop_padding(cell, level, image.size).ravel() for level, cell in row.cells.items()]
    # each level counts alike, however many pixels it has
    limits = np.array([np.percentile(x[np.isfinite(x)], _PERCENTILES) for x in maps])
    low, high = limits[:, 0].min(), limits[:, 1].max()
    return Normalize(low, high if high > low else low + 1e-6, clip=True)


def _draw_cell(
    axes: Axes,
    cell: Cell | None,
    level: int,
    grey: np.ndarray,
    scale: Normalize,
    image: InspectedImage,
) -> None:
    """A map over the photo in grey; a dash where the stage has none."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_LINE, linewidth=0.6)
    if cell is None:
        axes.set_facecolor("#f7f8fa")
        axes.text(0.5, 0.5, "—", transform=axes.transAxes, ha="center", va="center", color=_SOFT)
        return
    height, width = grey.shape
    heat = crop_padding(cell, level, image.size)
    # the last pixels of a map may reach beyond the image, which the model may have seen resized
    right = heat.shape[1] * 2**level * width / image.size[1] - 0.5
    bottom = heat.shape[0] * 2**level * height / image.size[0] - 0.5
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    style: dict[str, Any] = {"cmap": _HEAT_COLOURS, "alpha": _HEAT_ALPHA}
    extent = (-0.5, right, bottom, -0.5)
    axes.imshow(heat, norm=scale, extent=extent, interpolation="nearest", **style)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="auto")
    axes.set_title(cell.name, fontsize=_SMALL_SIZE, color=_SOFT, pad=2.5)
