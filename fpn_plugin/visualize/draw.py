"""A pyramid's graph as a picture: levels as rows, the finest at the bottom; time as columns.

Lengths are in inches.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.path import Path as Outline

from fpn_plugin.pyramid.graph import Operator, Step
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedEdge
from fpn_plugin.visualize.fusion_weights import FusionWeights
from fpn_plugin.visualize.layout import (
    DETAIL_SIZE,
    FONT,
    LABEL_SIZE,
    LINE_HEIGHT,
    NAME_SIZE,
    Route,
    entrance,
    is_output_mark,
    lay_out,
    make_grid,
    output_mark,
    ports,
)

CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}
# fill and border of each kind of box
BOX_COLOURS = {
    "bottom-up map": ("#e9ecf1", "#7b8794"),
    "lateral or block": ("#d6e6fa", "#3d7cc9"),
    "fusion": ("#fde7c8", "#d98a1f"),
    "output node": ("#d3efda", "#2f9e57"),
    "extra level": ("#e7dcf7", "#8257c7"),
    "step over several levels": ("#d5eeee", "#2b8c8c"),
}
# of arrows by direction, and what the legend says of them
ARROW_COLOURS = {"up": "#d1495b", "down": "#2a7f9e", "same": "#5c6773"}
DIRECTIONS = {"up": "to a finer level", "down": "to a coarser level", "same": "same level"}
_LINE_WIDTH = 1.2  # in points, where no weights are known
_THINNEST, _THICKEST = 0.5, 3.0  # of a weight of 0, and of the largest
_NARROW = 9.5  # up to this width the legend takes two lines

EdgeWeights = Mapping[tuple[str, int], float]  # by target and number of the input


def check_extension(path: str | Path) -> str:
    """The file type that a path asks for, ".png" or ".svg".

    Raises:
        ValueError: naming the path, if it is another.
    """
    extension = Path(path).suffix.lower()
    if extension not in CANVASES:
        raise ValueError(
            f"{str(path)!r}: cannot draw a file of type {extension!r};"
            f" choose from {', '.join(CANVASES)}"
        )
    return extension


def draw_graph(
    pyramid: GraphExecutor,
    path: str | Path,
    title: str = "",
    dpi: int = 160,
    weights: Mapping[str, FusionWeights] | None = None,
) -> None:
    """Draw the resolved graph of a pyramid or backbone, as PNG or SVG by the path's extension.

    Missing folders of the path are created.

    Args:
        title: a line above the picture.
        dpi: dots per inch of a PNG.
        weights: what the fusions have learned, by node; written on the arrows, which are as thick
            as their weights are large.

    Raises:
        ValueError: if the extension is neither .png nor .svg.
    """
    extension = check_extension(path)
    # text stays text in an SVG, and the same graph gives the same bytes for everyone
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "fpn_plugin", "font.family": FONT}
    with matplotlib.rc_context(settings):
        figure = _GraphFigure(pyramid, edge_weights(weights or {})).draw(title)
        CANVASES[extension](figure)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if extension == ".svg" else None)
    if extension == ".svg":  # a font of the same widths, where a reader's machine lacks ours
        svg = Path(path).read_text(encoding="utf-8")
        svg = svg.replace(f"'{FONT}'", f"'{FONT}', Verdana, sans-serif")
        Path(path).write_text(svg, encoding="utf-8")


# What the picture says: kinds of boxes, the lines in them, the labels on arrows.


def box_kind(pyramid: GraphExecutor, name: str) -> str:
    """The kind of a box: a key of BOX_COLOURS, or "" for the mark of an output."""
    graph = pyramid.graph
    if is_output_mark(name):
        return ""
    if name in graph.inputs:
        return "bottom-up map"
    step = next(step for step in pyramid.steps if name in step.node.maps())
    if isinstance(step.node, Step):
        return "step over several levels"
    if step.node.level > max(graph.inputs.values()) and step.fuse is None:
        if graph.level(step.edges[0].source) < step.node.level:
            return "extra level"
    if name in graph.outputs:
        return "output node"
    return "fusion" if step.fuse else "lateral or block"


def _short(operator: Operator) -> str:
    """An operator's name; its stride is the only argument that is shown."""
    return f"{operator.name} /{operator.stride}" if operator.stride > 1 else operator.name


def _box_texts(pyramid: GraphExecutor) -> dict[str, list[str]]:
    """The lines in each box: its name, then its channels (bottom-up maps) or operators (nodes); for
    each map of a step its own."""
    texts = {}
    bottom_up = getattr(pyramid, "bottom_up", None)
    shapes = bottom_up.output_shape() if bottom_up is not None else {}
    for name in pyramid.graph.inputs:
        texts[name] = [name, f"{shapes[name].channels} ch"] if name in shapes else [name]
    for step in pyramid.steps:
        operators = [_short(part.operator) for part in (step.fuse, step.block) if part]
        texts.update({name: [name, *operators] for name in step.node.maps()})
    for output, node in pyramid.graph.output_names().items():
        texts[output_mark(node)] = [output]
    return texts


def _usual_resamplers(pyramid: GraphExecutor) -> dict[str, str]:
    """The most frequent resampler of each direction: the legend names it, its arrows do not."""
    resamplers = [edge.resample for step in pyramid.steps for edge in step.edges if edge.resample]
    counts = Counter((part.kind, _short(part.operator)) for part in resamplers)
    return {kind: name for (kind, name), _ in reversed(counts.most_common())}


def _edge_label(edge: ResolvedEdge, usual: Mapping[str, str], weight: float | None) -> str:
    """What happens on an edge besides the usual resampling, and its learned weight."""
    names = [(part, _short(part.operator)) for part in edge.parts()]
    texts = [name for part, name in names if part is not edge.resample or name != usual[part.kind]]
    if weight is not None:
        texts.append(f"{weight:.2f}")
    return " · ".join(texts)


def edge_weights(weights: Mapping[str, FusionWeights]) -> dict[tuple[str, int], float]:
    """One number per input of each fusion that has learned weights: the mean over the channels."""
    return {
        (name, i): weight
        for name, fusion in weights.items()
        for i, weight in enumerate(fusion.means())
    }


def line_widths(weights: EdgeWeights) -> dict[tuple[str, int], float]:
    """The width of each arrow in points, in proportion to a weight's size."""
    largest = max((abs(weight) for weight in weights.values()), default=0.0) or 1.0
    return {
        key: _THINNEST + (_THICKEST - _THINNEST) * abs(weight) / largest
        for key, weight in weights.items()
    }


class _GraphFigure:
    """The figure of one graph. The data units of its axes are inches."""

    def __init__(self, pyramid: GraphExecutor, weights: EdgeWeights) -> None:
        self.pyramid = pyramid
        self.weights = weights
        self.layout = lay_out(pyramid.graph)
        self.texts = _box_texts(pyramid)
        self.usual = _usual_resamplers(pyramid)
        self.labels = {
            (entrance(step.node, i), i): _edge_label(
                edge, self.usual, weights.get((step.node.name, i))
            )
            for step in pyramid.steps
            for i, edge in enumerate(step.edges)
        }
        # the finest and the coarsest map of the step that a map belongs to
        self.spans = {
            name: (maps[0], maps[-1])
            for step in pyramid.steps
            for maps in [list(step.node.maps())]
            for name in maps
        }
        self.grid = make_grid(self.layout, self.texts, self.labels)
        self.axes: Axes

    def draw(self, title: str) -> Figure:
        """All of it: the levels' bands, arrows on them, boxes on the arrows, title and legend."""
        width = self.grid.right + 0.2
        above, below = (0.35 if title else 0.05), (0.42 if width > _NARROW else 0.6)
        below *= _legend_scale(width)
        figure = Figure(figsize=(width, self.grid.top + above + below), facecolor="white")
        self.axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(-below, self.grid.top + above)
        self.axes.set_axis_off()
        if title:
            style: dict[str, Any] = {"ha": "center", "va": "center", "weight": "bold"}
            self.axes.text(width / 2, self.grid.top + 0.17, title, fontsize=11, **style)
        self._draw_levels()
        self._draw_arrows()
        for name in self.layout.cells:
            self._draw_box(name)
        self._draw_legend(figure)
        return figure

    def _draw_levels(self) -> None:
        """A band per level, with its level and stride."""
        grid, left = self.grid, 0.1
        top = grid.top
        for row, level in enumerate(self.layout.levels):
            middle = grid.middle[row]
            last = row == len(self.layout.levels) - 1
            bottom = 0.0 if last else middle - grid.height / 2 - grid.gaps[row] / 2
            fill = "#f7f8fa" if row % 2 else "#eff2f6"
            size = (grid.right + 0.1 - left, top - bottom)
            self.axes.add_patch(Rectangle((left, bottom), *size, facecolor=fill, edgecolor="none"))
            texts = (
                (middle + 0.08, f"level {level}", NAME_SIZE, "#3a4450"),
                (middle - 0.08, f"stride {2 ** level}", DETAIL_SIZE, "#7b8794"),
            )
            for y, text, points, colour in texts:
                self.axes.text(left + 0.1, y, text, va="center", fontsize=points, color=colour)
            top = bottom

    def _draw_arrows(self) -> None:
        """Those that enter a box in the order of the heights at which they come."""
        widths = line_widths(self.weights)
        by_target: dict[str, list[Route]] = {}
        for route in self.layout.routes:
            by_target.setdefault(route.target, []).append(route)
        for target, routes in by_target.items():
            heights = [self._run_height(route) for route in routes]
            middle = self.grid.middle[self.layout.cells[target][1]]
            reach = self.grid.height / 2 - 0.06
            for route, port in zip(routes, ports(heights, middle, reach)):
                self._draw_arrow(route, port, widths.get((target, route.index), _LINE_WIDTH))

    def _run_height(self, route: Route) -> float:
        """The height at which an arrow comes to its target's column."""
        if route.track is not None:
            return self.grid.track_height(route.track)
        return self.grid.middle[self.layout.cells[route.source][1]]

    def _direction(self, route: Route) -> str:
        i, j = (self.layout.cells[name][1] for name in (route.source, route.target))
        return "same" if i == j else "up" if i < j else "down"

    def _draw_arrow(self, route: Route, port: float, width: float) -> None:
        """An arrow that enters its target at the height `port`, and the label on its last part."""
        grid, column = self.grid, self.layout.cells[route.target][0]
        to_mark = is_output_mark(route.target)
        colour = ARROW_COLOURS[self._direction(route)]
        style: dict[str, Any] = {"color": colour, "linewidth": width, "mutation_scale": 8}
        style |= {"arrowstyle": "-" if to_mark else "-|>", "shrinkA": 0, "shrinkB": 0}
        path = self._outline(route, port)
        self.axes.add_patch(FancyArrowPatch(path=path, fill=False, zorder=2, **style))
        label = "" if to_mark else self.labels[route.target, route.index]
        if label:
            box: dict[str, Any] = {"boxstyle": "round,pad=0.12", "facecolor": "white"}
            box |= {"linewidth": 0.5, "edgecolor": colour}
            text: dict[str, Any] = {"fontsize": LABEL_SIZE, "color": colour, "zorder": 5}
            x = (grid.left[column - 1] + grid.width[column - 1] + grid.left[column] - 0.08) / 2
            y = (self._run_height(route) + port) / 2
            self.axes.text(x, y, label, bbox=box, ha="center", va="center", **text)

    def _outline(self, route: Route, port: float) -> Outline:
        """An arrow's line."""
        grid = self.grid
        (a, i), (b, _) = self.layout.cells[route.source], self.layout.cells[route.target]
        start, end = grid.left[a] + grid.width[a], grid.left[b]
        points, codes = [(start, grid.middle[i])], [Outline.MOVETO]

        def bend(x0: float, x1: float, y: float) -> None:
            """From the last point along its height to x0, then an S to (x1, y)."""
            last, middle = points[-1][1], (x0 + x1) / 2
            points.extend([(x0, last), (middle, last), (middle, y), (x1, y)])
            codes.extend([Outline.LINETO, *[Outline.CURVE4] * 3])

        # onto the track, in the gap after the source's column
        if route.track is not None:
            bend(start + 0.02, grid.left[a + 1] - 0.04, grid.track_height(route.track))
        # and to the port, in the gap before the target's column
        bend(grid.left[b - 1] + grid.width[b - 1] + 0.04, end - 0.12, port)
        return Outline([*points, (end, port)], [*codes, Outline.LINETO])

    def _draw_box(self, name: str) -> None:
        """A node, a step's map, or the mark of an output: a pill in white on green.

        The box of a step reaches from its finest map to its coarsest; it comes with the latter.
        """
        column, row = self.layout.cells[name]
        x, width, y = self.grid.left[column], self.grid.width[column], self.grid.middle[row]
        kind, lines = box_kind(self.pyramid, name), self.texts[name]
        finest, coarsest = self.spans.get(name, (name, name))
        if kind:
            (fill, border), height, radius = BOX_COLOURS[kind], self.grid.height, 0.07
        else:
            fill, border, height, radius = BOX_COLOURS["output node"][1], "none", 0.27, 0.13
        if name == coarsest:
            style: dict[str, Any] = {"boxstyle": f"round,pad=0,rounding_size={radius}", "zorder": 3}
            style |= {"facecolor": fill, "edgecolor": border, "linewidth": 1.1}
            bottom = self.grid.middle[self.layout.cells[finest][1]] - height / 2
            size = (width, y + height / 2 - bottom)
            self.axes.add_patch(FancyBboxPatch((x, bottom), *size, **style))
        for number, line in enumerate(lines):
            points, weight, colour = (
                (DETAIL_SIZE, "normal", "#46525e") if number else (NAME_SIZE, "bold", "#1f2933")
            )
            text: dict[str, Any] = {"fontsize": points, "weight": weight}
            text |= {"color": colour if kind else "white", "ha": "center", "va": "center"}
            line_y = y + ((len(lines) - 1) / 2 - number) * LINE_HEIGHT - 0.008
            self.axes.text(x + width / 2, line_y, line, zorder=4, **text)

    def _draw_legend(self, figure: Figure) -> None:
        """The kinds of boxes and directions of arrows that there are."""
        kinds = {box_kind(self.pyramid, name) for name in self.layout.cells}
        handles: list[Patch | Line2D] = [
            Patch(facecolor=fill, edgecolor=border, label=kind)
            for kind, (fill, border) in BOX_COLOURS.items()
            if kind in kinds
        ]
        directions = {self._direction(route) for route in self.layout.routes}
        for name, colour in ARROW_COLOURS.items():
            if name in directions:
                resampler = f" ({self.usual[name]})" if name in self.usual else ""
                label = DIRECTIONS[name] + resampler
                handles.append(Line2D([], [], color=colour, linewidth=1.4, label=label))
        if self.weights:
            handles.append(Line2D([], [], linestyle="", label="on an arrow: learned weight"))
        narrow = figure.get_figwidth() <= _NARROW
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=-(-len(handles) // 2) if narrow else len(handles),
            frameon=False,
            fontsize=DETAIL_SIZE * _legend_scale(figure.get_figwidth()),
            columnspacing=1.4,
            handlelength=1.6,
        )


def _legend_scale(width: float) -> float:
    """How much larger the legend of a wide picture is, which is seen smaller than it is."""
    return min(max(width / _NARROW - 0.2, 1.0), 2.5)
