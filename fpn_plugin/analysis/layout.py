"""Where the boxes and arrows of a drawn graph go: columns are time, rows are levels.

This module imports neither matplotlib nor torch. A cell is `(column, row)`; row 0 is the coarsest
level, on top. An arrow runs left to right: it leaves its source's cell, changes height in the gap
after that column, runs along a track, changes height again in the gap before its target's column,
and enters. A track is the middle line of a row where its cells are free, else a lane between two
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fpn_plugin.pyramid.graph import Graph

Cell = tuple[int, int]


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
    """An arrow: from one name to another, along a track (None between neighbouring columns)."""

    source: str
    target: str
    index: int
    track: Track | None


@dataclass
class Layout:
    """Cells by name, routes, and what they need.

    Attributes:
        levels: of the rows, coarsest first.
        cells: of inputs, nodes, and outputs ("-> name" stands for the mark of that output, in the
            last column).
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
            row = -1 if route.track is None or route.track.lane is not None else route.track.row
            if route.track is None:
                count += b == column and i != j
            else:
                count += (a + 1 == column and row != i) + (b == column and row != j)
        return count


def output_mark(name: str) -> str:
    """What the layout calls the mark of an output node."""
    return f"-> {name}"


def lay_out(graph: Graph) -> Layout:
    """Cells and routes for a checked graph.

    A node's column is the longest path to it from the inputs, or the next free one of its row.
    """
    levels = sorted({*graph.inputs.values(), *(item.level for item in graph.nodes)}, reverse=True)
    layout = Layout(levels)
    taken: dict[Cell, str] = {}

    def place(name: str, column: int, level: int) -> None:
        row = levels.index(level)
        while (column, row) in taken:
            column += 1
        layout.cells[name] = (column, row)
        taken[column, row] = name

    for name, level in graph.inputs.items():
        place(name, 0, level)
    for item in graph.nodes:
        place(item.name, 1 + max(layout.cells[edge.source][0] for edge in item.inputs), item.level)
    last = layout.columns
    for name in graph.outputs:
        place(output_mark(name), last, graph.level(name))
    _Router(layout, taken).route(graph)
    return layout


class _Router:
    """Gives every arrow a track that no box is on; only arrows of one source share a track."""

    def __init__(self, layout: Layout, taken: dict[Cell, str]) -> None:
        self.layout = layout
        self.boxes = taken
        self.used: dict[tuple[Track, int], str] = (
            {}
        )  # (track, column) -> the source whose arrow runs there

    def route(self, graph: Graph) -> None:
        """The shortest arrows choose first, those within a row before the others."""
        pairs = [
            (edge.source, item.name, i)
            for item in graph.nodes
            for i, edge in enumerate(item.inputs)
        ]
        pairs += [(name, output_mark(name), 0) for name in graph.outputs]
        cells = self.layout.cells

        def order(pair: tuple[str, str, int]) -> tuple[bool, bool, int]:
            (a, i), (b, j) = cells[pair[0]], cells[pair[1]]
            return i != j, pair[1].startswith("->"), b - a

        for source, target, index in sorted(pairs, key=order):
            self.layout.routes.append(Route(source, target, index, self._track(source, target)))

    def _track(self, source: str, target: str) -> Track | None:
        (a, i), (b, j) = self.layout.cells[source], self.layout.cells[target]
        if b == a + 1:
            return None
        between = range(a + 1, b)
        for row in dict.fromkeys((j, i)):
            if all((c, row) not in self.boxes for c in between) and self._free(
                Track(row), source, between
            ):
                return self._take(Track(row), source, between)
        # the gap beside the target's row, on the source's side; gap g is below row g
        gap = j if i > j else j - 1
        lane = 0
        while not self._free(Track(gap, lane), source, between):
            lane += 1
        self.layout.lanes[gap] = max(self.layout.lanes.get(gap, 0), lane + 1)
        return self._take(Track(gap, lane), source, between)

    def _free(self, track: Track, source: str, columns: range) -> bool:
        return all(self.used.get((track, c), source) == source for c in columns)

    def _take(self, track: Track, source: str, columns: range) -> Track:
        self.used.update({(track, c): source for c in columns})
        return track


def ports(heights: list[float], middle: float, reach: float) -> list[float]:
    """Where arrows that come from these heights enter a box's side.

    They enter in the same order, so that they do not cross. One that comes along the
    middle goes straight in.

    Args:
        reach: how far from the middle of the side they may enter.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    level = [place for place, i in enumerate(order) if abs(heights[i] - middle) < 1e-6]
    centre = level[0] if level else (len(order) - 1) / 2
    furthest = max(centre, len(order) - 1 - centre)
    step = min(0.15, reach / furthest) if furthest else 0.0
    ports = {i: middle + (place - centre) * step for place, i in enumerate(order)}
    return [ports[i] for i in range(len(heights))]
