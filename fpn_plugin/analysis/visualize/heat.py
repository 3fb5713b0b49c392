"""Heat maps: the strength of a pyramid's maps over the image, a grid of stages and levels.

Lengths are in inches, from the figure's lower left corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fpn_plugin.analysis.visualize.look import Seen
from fpn_plugin.analysis.visualize.rows import Cell, Row
from fpn_plugin.analysis.visualize.style import INK, LINE, SMALL, SOFT, TEXT

_COLOURS = "magma"
_ALPHA = 0.8  # of the heat on the photo
_PERCENTILES = (1.0, 99.0)  # a few wild pixels must not set the scale
LEFT, RIGHT, GAP, CAPTION, HEAD = 0.62, 0.62, 0.08, 0.2, 0.3


@dataclass(frozen=True)
class HeatGrid:
    """Where the cells of the grid are.

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
        return HEAD + self.rows * (self.height + CAPTION + GAP)


def make_grid(rows: Sequence[Row], width: float, aspect: float) -> HeatGrid:
    """A grid for these rows.

    Args:
        width: of all of it.
        aspect: height of the image by its width.
    """
    levels = sorted({level for row in rows for level in row.cells})
    room = (width - LEFT - RIGHT) / len(levels) - GAP
    cell = min(room, 2.6, 2.6 / aspect)
    return HeatGrid(levels, cell, cell * aspect, len(rows))


def draw_heat(figure: Figure, grid: HeatGrid, rows: Sequence[Row], seen: Seen) -> None:
    """Draw the rows at the bottom of a figure, the first on top."""
    width, height = figure.get_size_inches()
    grey = seen.pixels.mean(axis=2) / 255
    for number, row in enumerate(rows):
        bottom = grid.total - HEAD - (number + 1) * (grid.height + CAPTION + GAP) + GAP
        scale = _scale(row, seen)
        middle = (bottom + grid.height / 2) / height
        turned: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center", "color": INK}
        words = row.title.replace(", ", ",\n")
        figure.text(0.3 / width, middle, words, fontsize=TEXT, linespacing=1.1, **turned)
        for column, level in enumerate(grid.levels):
            left = LEFT + column * (grid.width + GAP)
            place = (left / width, bottom / height, grid.width / width, grid.height / height)
            axes = figure.add_axes(place)
            _draw_cell(axes, row.cells.get(level), level, grey, scale, seen)
            if number == 0:
                centre, above = left + grid.width / 2, bottom + grid.height + CAPTION + 0.06
                title = f"level {level}, stride {2**level}"
                style: dict[str, Any] = {"fontsize": TEXT, "color": INK, "ha": "center"}
                figure.text(centre / width, above / height, title, **style)
        _draw_scale(figure, grid, bottom, scale)


def crop(cell: Cell, level: int, size: tuple[int, int]) -> np.ndarray:
    """A map without what only padding gave: `(h, w)`.

    Args:
        size: height and width that the model saw the image at.
    """
    rows, columns = (-(-side // 2**level) for side in size)
    return cell.strength[:rows, :columns].numpy()


def _scale(row: Row, seen: Seen) -> Normalize:
    values = [crop(cell, level, seen.size).ravel() for level, cell in row.cells.items()]
    # each level counts alike, however many pixels it has
    limits = np.array([np.percentile(item[np.isfinite(item)], _PERCENTILES) for item in values])
    low, high = limits[:, 0].min(), limits[:, 1].max()
    return Normalize(low, high if high > low else low + 1e-6, clip=True)


def _draw_cell(
    axes: Axes, cell: Cell | None, level: int, grey: np.ndarray, scale: Normalize, seen: Seen
) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=LINE, linewidth=0.6)
    if cell is None:
        axes.set_facecolor("#f7f8fa")
        axes.text(0.5, 0.5, "—", transform=axes.transAxes, ha="center", va="center", color=SOFT)
        return
    height, width = grey.shape
    heat = crop(cell, level, seen.size)
    # a map's pixel covers so many of the image's, which the model may have seen resized
    right = heat.shape[1] * 2**level * width / seen.size[1] - 0.5
    bottom = heat.shape[0] * 2**level * height / seen.size[0] - 0.5
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    axes.imshow(
        heat,
        cmap=_COLOURS,
        norm=scale,
        alpha=_ALPHA,
        extent=(-0.5, right, bottom, -0.5),
        interpolation="nearest",
    )
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="auto")
    axes.set_title(cell.name, fontsize=SMALL, color=SOFT, pad=2.5)


def _draw_scale(figure: Figure, grid: HeatGrid, bottom: float, scale: Normalize) -> None:
    width, height = figure.get_size_inches()
    left = LEFT + len(grid.levels) * (grid.width + GAP) + 0.02
    axes = figure.add_axes((left / width, bottom / height, 0.1 / width, grid.height / height))
    bar = figure.colorbar(ScalarMappable(scale, colormaps[_COLOURS]), cax=axes)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, length=2, color=SOFT)
    bar.ax.locator_params(nbins=4)
