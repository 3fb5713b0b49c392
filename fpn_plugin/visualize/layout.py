"""Where the boxes and arrows of a drawn graph go: rows are levels, columns are steps in time.

A cell is `(column, row)`; row 0 is the coarsest level, on top. An arrow runs left to right: it
leaves its source's cell, changes height in the gap after that column, runs along a track, changes
height again in the gap before its target's column, and enters. A track is the middle line of a row
where its cells are free, else a lane between two rows. A step has a cell for each of its maps, in
one column, which it has for itself from its finest to its coarsest row.

:func:`lay_out` chooses cells and tracks, :func:`make_grid` their sizes and positions in inches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from fpn_plugin.pyramid.graph import Graph, Node, Step

FONT = "DejaVu Sans"
NAME_SIZE, DETAIL_SIZE, LABEL_SIZE = 8.5, 7.0, 6.5  # font sizes in points
LINE_HEIGHT = 0.145  # of a line of text
_LANE_HEIGHT, _PADDING = 0.11, 0.1
_MAX_PORT_STEP = 0.15  # between two arrows that enter the same box
_OUTPUT_MARK = "-> "

Cell = tuple[int, int]
Labels = Mapping[tuple[str, int], str]  # by target and number of the input


@dataclass(frozen=True)
class Track:
    """The horizontal part of an arrow.

    The middle of `row` if `lane` is None, else a lane in the gap below `row`; the gap above the top
    row is below row -1.
    """

    row: int
    lane: int | None = None


@dataclass(frozen=True)
class Route:
    """An arrow: from one name to another, along a track (None between neighbouring columns).

    Attributes:
        index: the number of the input at the target.
    """

    source: str
    target: str
    index: int
    track: Track | None


@dataclass
class Layout:
    """Cells by name, routes, and what they need.

    Attributes:
        levels: of the rows, coarsest first.
        cells: of inputs, nodes, the maps of steps, and the marks of outputs (:func:`output_mark`),
            which stand in the last column.
        lanes: how many lanes the gap below each row holds; -1 is the gap above the top row.
    """

    levels: list[int]
    cells: dict[str, Cell] = field(default_factory=dict)
    routes: list[Route] = field(default_factory=list)
    lanes: dict[int, int] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """The number of columns, with that of the outputs' marks."""
        return 1 + max(column for column, _ in self.cells.values())

    def bends(self, column: int) -> int:
        """How many arrows change height in the gap before a column."""
        count = 0
        for route in self.routes:
            (a, i), (b, j) = self.cells[route.source], self.cells[route.target]
            if route.track is None:
                count += b == column and i != j
            else:
                row = route.track.row if route.track.lane is None else None
                count += (a + 1 == column and row != i) + (b == column and row != j)
        return count


def output_mark(name: str) -> str:
    """What the layout calls the mark of an output node."""
    return _OUTPUT_MARK + name


def is_output_mark(name: str) -> bool:
    """Whether a name of the layout is the mark of an output and no node."""
    return name.startswith(_OUTPUT_MARK)


def entrance(node: Node | Step, index: int) -> str:
    """The cell that an input of a node or step enters: a step's map of the input's level."""
    return list(node.maps())[index] if isinstance(node, Step) else node.name


def lay_out(graph: Graph) -> Layout:
    """Find cells and routes for a checked graph."""
    layout = Layout(sorted(set(graph.levels().values()), reverse=True))
    occupied: set[Cell] = set()

    def place(maps: Mapping[str, int], column: int) -> None:
        """Place boxes in the first column from `column` on where their rows are free."""
        rows = [layout.levels.index(level) for level in maps.values()]
        span = range(min(rows), max(rows) + 1)
        while any((column, row) in occupied for row in span):
            column += 1
        layout.cells.update({name: (column, row) for name, row in zip(maps, rows)})
        occupied.update((column, row) for row in span)

    # 1. Inputs come first. A node stands to the right of all that it reads, so that every arrow
    #    runs left to right: without conflicts its column is the longest path to it.
    for name, level in graph.inputs.items():
        place({name: level}, 0)
    for node in graph.nodes:
        place(node.maps(), 1 + max(layout.cells[edge.source][0] for edge in node.inputs))

    # 2. All outputs are marked in one column, the last.
    last = layout.columns
    for name in graph.outputs:
        place({output_mark(name): graph.level(name)}, last)

    # 3. Straight and short arrows choose their tracks first: they have the fewest alternatives.
    edges = [
        (edge.source, entrance(node, i), i)
        for node in graph.nodes
        for i, edge in enumerate(node.inputs)
    ]
    edges += [(name, output_mark(name), 0) for name in graph.outputs]

    def priority(edge: tuple[str, str, int]) -> tuple[bool, bool, int]:
        (a, i), (b, j) = layout.cells[edge[0]], layout.cells[edge[1]]
        return i != j, is_output_mark(edge[1]), b - a

    router = _Router(layout, occupied)
    for source, target, index in sorted(edges, key=priority):
        layout.routes.append(Route(source, target, index, router.track(source, target)))
    return layout


class _Router:
    """Gives every arrow a track that no box is on; only arrows of one source share a track."""

    def __init__(self, layout: Layout, occupied: set[Cell]) -> None:
        self.layout = layout
        self.occupied = occupied
        # (track, column) -> the source whose arrow runs there
        self.users: dict[tuple[Track, int], str] = {}

    def track(self, source: str, target: str) -> Track | None:
        """Reserve a track for an arrow, and the lane that it needs."""
        (a, i), (b, j) = self.layout.cells[source], self.layout.cells[target]
        crossed = range(a + 1, b)  # the columns between
        # 1. Neighbouring columns need no track.
        if not crossed:
            return None
        # 2. Along the middle of the target's row or of the source's, if no box is in the way.
        for row in (j, i):
            free = all((column, row) not in self.occupied for column in crossed)
            if free and self._reserve(Track(row), source, crossed):
                return Track(row)
        # 3. Else in the gap beside the target's row, on the source's side (gap g is below row g),
        #    in the first lane that is free or has this source's arrows already.
        gap = j if i > j else j - 1
        lane = 0
        while not self._reserve(Track(gap, lane), source, crossed):
            lane += 1
        self.layout.lanes[gap] = max(self.layout.lanes.get(gap, 0), lane + 1)
        return Track(gap, lane)

    def _reserve(self, track: Track, source: str, columns: range) -> bool:
        """Take a track in these columns for a source; False if another source has part of it."""
        if any(self.users.get((track, column), source) != source for column in columns):
            return False
        self.users.update({(track, column): source for column in columns})
        return True


def ports(heights: list[float], middle: float, reach: float) -> list[float]:
    """Where arrows that come from these heights enter a box's side.

    They enter in the order of their heights, so that they do not cross. One that comes along the
    middle goes straight in.

    Args:
        middle: the height of the middle of the side.
        reach: how far from the middle they may enter.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    # the place in that order which lies on the middle: that of a straight arrow, or the centre
    straight = [place for place, i in enumerate(order) if abs(heights[i] - middle) < 1e-6]
    centre = straight[0] if straight else (len(order) - 1) / 2
    # evenly spaced around it, closer together where the outermost would leave the side
    furthest = max(centre, len(order) - 1 - centre)
    step = min(_MAX_PORT_STEP, reach / furthest) if furthest else 0.0
    entries = [middle] * len(heights)
    for place, i in enumerate(order):
        entries[i] += (place - centre) * step
    return entries


@dataclass
class Grid:
    """Sizes and positions in inches, from the lower left corner.

    Attributes:
        left: left edge of each column's boxes.
        width: of each column's boxes.
        middle: of each row.
        height: of every box.
        gaps: height of the gap below each row; -1 is the gap above the top row.
        lanes: as in :class:`Layout`.
    """

    left: list[float]
    width: list[float]
    middle: list[float]
    height: float
    gaps: Mapping[int, float]
    lanes: Mapping[int, int]

    @property
    def right(self) -> float:
        """The right edge of the last column."""
        return self.left[-1] + self.width[-1]

    @property
    def top(self) -> float:
        """The upper edge of the gap above the top row."""
        return self.middle[0] + self.height / 2 + self.gaps[-1]

    def track_height(self, track: Track) -> float:
        """Where a track runs."""
        if track.lane is None:
            return self.middle[track.row]
        top = self.middle[track.row] - self.height / 2 if track.row >= 0 else self.top
        # the lanes are centred in the gap
        offset = (track.lane - (self.lanes[track.row] - 1) / 2) * _LANE_HEIGHT
        return top - self.gaps[track.row] / 2 + offset


def make_grid(layout: Layout, texts: Mapping[str, list[str]], labels: Labels) -> Grid:
    """A grid as large as the texts in the boxes and the labels on the arrows need.

    Args:
        texts: the lines in each box.
    """
    # 1. A column is as wide as its longest line.
    width = [0.36] * layout.columns
    for name, (column, _) in layout.cells.items():
        first, *others = texts[name]
        lines = [_text_width(first, NAME_SIZE, "bold")]
        lines += [_text_width(line, DETAIL_SIZE) for line in others]
        width[column] = max(width[column], max(lines) + 2 * _PADDING)
    # 2. The gap before it has room for all that changes height there, and for its labels.
    gap = [0.36 + 0.04 * min(layout.bends(column), 12) for column in range(layout.columns)]
    for (target, _), label in labels.items():
        column = layout.cells[target][0]
        gap[column] = max(gap[column], _text_width(label, LABEL_SIZE) + 0.34)
    gap[0] = 1.0  # room for the rows' titles
    left = [sum(gap[: i + 1]) + sum(width[:i]) for i in range(layout.columns)]
    # 3. All boxes are as high as the fullest; the gap between two rows has room for its lanes.
    height = max(len(lines) for lines in texts.values()) * LINE_HEIGHT + 0.16
    count = len(layout.levels)
    gaps = {row: 0.3 + layout.lanes.get(row, 0) * _LANE_HEIGHT for row in range(-1, count)}
    for outer in (-1, count - 1):
        gaps[outer] -= 0.1
    middle = [
        sum(gaps[below] for below in range(row, count)) + (count - row - 0.5) * height
        for row in range(count)
    ]
    return Grid(left, width, middle, height, gaps, layout.lanes)


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    if not text:
        return 0.0
    font = FontProperties(family=FONT, weight=weight)
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width) / 72
