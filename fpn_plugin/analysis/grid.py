"""Sizes and positions, in inches, of the columns, rows, lanes and boxes of a drawn graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from fpn_plugin.analysis.layout import Layout, Route

FONT = "DejaVu Sans"
NAME, DETAIL, LABEL = 8.5, 7.0, 6.5  # font sizes in points
LINE = 0.145  # the height of a line of text
_LANE, _PAD = 0.11, 0.1
Labels = Mapping[tuple[str, int], str]  # by target and number of the input


@dataclass
class Grid:
    """Sizes and positions of columns and rows."""

    left: list[float]  # of the boxes of each column
    width: list[float]
    middle: list[float]  # of each row
    height: float  # of every box
    lanes: Mapping[int, int]
    gaps: Mapping[int, float]  # height of the gap below each row; -1: above the top row

    def track(self, route: Route) -> float:
        """The height of a route's horizontal run."""
        assert route.track is not None
        row, lane = route.track.row, route.track.lane
        if lane is None:
            return self.middle[row]
        top = (
            self.middle[row] - self.height / 2
            if row >= 0
            else self.middle[0] + self.height / 2 + self.gaps[-1]
        )
        return top - self.gaps[row] / 2 + (lane - (self.lanes[row] - 1) / 2) * _LANE


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    if not text:
        return 0.0
    font = FontProperties(family=FONT, weight=weight)
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width) / 72


def make_grid(layout: Layout, texts: Mapping[str, list[str]], labels: Labels) -> Grid:
    """As large as the texts in the boxes and the labels on the arrows need.

    Args:
        texts: the lines in each box.
    """
    width = [0.36] * layout.columns
    for name, (column, _) in layout.cells.items():
        first, *others = texts[name]
        longest = max(
            _text_width(first, NAME, "bold"), *(_text_width(x, DETAIL) for x in others), 0
        )
        width[column] = max(width[column], longest + 2 * _PAD)
    # the gap before each column, wide enough for its labels and for all that changes height in it
    gap = [0.36 + 0.04 * min(layout.bends(column), 12) for column in range(layout.columns)]
    for (target, _), label in labels.items():
        column = layout.cells[target][0]
        gap[column] = max(gap[column], _text_width(label, LABEL) + 0.34)
    gap[0] = 1.0  # room for the rows' titles
    left = [sum(gap[: i + 1]) + sum(width[:i]) for i in range(layout.columns)]
    height = max(len(lines) for lines in texts.values()) * LINE + 0.16
    gaps, middle = _rows(layout, height)
    return Grid(left, width, middle, height, layout.lanes, gaps)


def _rows(layout: Layout, height: float) -> tuple[dict[int, float], list[float]]:
    """The gap below each row (-1: above the top row), and the middle of each row."""
    count = len(layout.levels)
    gaps = {row: 0.3 + layout.lanes.get(row, 0) * _LANE for row in range(-1, count)}
    for row in (-1, count - 1):  # outside the top and the bottom row
        gaps[row] -= 0.1
    middle = [
        sum(gaps[below] for below in range(row, count)) + (count - row - 0.5) * height
        for row in range(count)
    ]
    return gaps, middle
