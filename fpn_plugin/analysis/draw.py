"""A pyramid's graph as a picture: levels as rows, the finest at the bottom; time as columns.

Lengths are in inches.
"""

from __future__ import annotations

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

from fpn_plugin.analysis.captions import (
    KINDS,
    Learned,
    box_texts,
    edge_label,
    kind_of,
    learned_weights,
    line_widths,
    usual_resamplers,
)
from fpn_plugin.analysis.fusion_weights import FusionWeights
from fpn_plugin.analysis.grid import DETAIL, FONT, LABEL, LINE, NAME, Grid, Labels, make_grid
from fpn_plugin.analysis.layout import Layout, Route, lay_out, ports
from fpn_plugin.pyramid.pyramid import GraphExecutor

CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}
COLOURS = {"up": "#d1495b", "down": "#2a7f9e", "same": "#5c6773"}
WORDS = {"up": "to a finer level", "down": "to a coarser level", "same": "same level"}
_LINE_WIDTH = 1.2
_NARROW = 9.5  # up to this width the legend takes two lines


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

    Folders of the path that do not exist are made.

    Args:
        title: a line above the picture.
        dpi: dots per inch of a PNG.
        weights: what the fusions have learned, by node: written on the arrows, and their width.

    Raises:
        ValueError: if the extension is neither .png nor .svg.
    """
    extension = check_extension(path)
    # text stays text in an SVG, and the same graph gives the same bytes for everyone
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "fpn_plugin", "font.family": FONT}
    with matplotlib.rc_context(settings):
        figure = _draw(pyramid, title, learned_weights(weights or {}))
        CANVASES[extension](figure)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if extension == ".svg" else None)


def _draw(pyramid: GraphExecutor, title: str, learned: Learned) -> Figure:
    layout = lay_out(pyramid.graph)
    texts = box_texts(pyramid)
    usual = usual_resamplers(pyramid)
    labels = {
        (step.node.name, i): edge_label(edge, usual, learned.get((step.node.name, i)))
        for step in pyramid.steps
        for i, edge in enumerate(step.edges)
    }
    grid = make_grid(layout, texts, labels)
    figure, axes = _canvas(grid, layout, title)
    _draw_rows(axes, grid, layout)
    _draw_edges(axes, grid, layout, labels, line_widths(learned))
    for name, (column, row) in layout.cells.items():
        _draw_box(axes, grid, column, row, texts[name], kind_of(pyramid, name))
    _draw_legend(figure, pyramid, layout, usual, bool(learned))
    return figure


def _canvas(grid: Grid, layout: Layout, title: str) -> tuple[Figure, Axes]:
    """A figure whose data units are inches, with room for the title and the legend."""
    width = grid.left[-1] + grid.width[-1] + 0.2
    height = grid.middle[0] + grid.height / 2 + grid.gaps[-1]
    above, below = (0.35 if title else 0.05), (0.42 if width > _NARROW else 0.6)
    figure = Figure(figsize=(width, height + above + below), facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(-below, height + above)
    axes.set_axis_off()
    if title:
        axes.text(
            width / 2, height + 0.17, title, ha="center", va="center", fontsize=11, weight="bold"
        )
    return figure, axes


def _draw_rows(axes: Axes, grid: Grid, layout: Layout) -> None:
    """A band per level, with its level and stride."""
    right = grid.left[-1] + grid.width[-1] + 0.1
    top = grid.middle[0] + grid.height / 2 + grid.gaps[-1]
    for row, level in enumerate(layout.levels):
        last = row == len(layout.levels) - 1
        bottom = 0.0 if last else grid.middle[row] - grid.height / 2 - grid.gaps[row] / 2
        colour = "#f7f8fa" if row % 2 else "#eff2f6"
        axes.add_patch(
            Rectangle((0.1, bottom), right - 0.1, top - bottom, facecolor=colour, edgecolor="none")
        )
        axes.text(
            0.2,
            grid.middle[row] + 0.08,
            f"level {level}",
            va="center",
            fontsize=NAME,
            color="#3a4450",
        )
        axes.text(
            0.2,
            grid.middle[row] - 0.08,
            f"stride {2 ** level}",
            va="center",
            fontsize=DETAIL,
            color="#7b8794",
        )
        top = bottom


def _draw_edges(
    axes: Axes, grid: Grid, layout: Layout, labels: Labels, widths: Mapping[tuple[str, int], float]
) -> None:
    by_target: dict[str, list[Route]] = {}
    for route in layout.routes:
        by_target.setdefault(route.target, []).append(route)
    for target, routes in by_target.items():
        heights = [
            grid.track(r) if r.track else grid.middle[layout.cells[r.source][1]] for r in routes
        ]
        middle = grid.middle[layout.cells[target][1]]
        for route, port in zip(routes, ports(heights, middle, grid.height / 2 - 0.06)):
            label = "" if target.startswith("->") else labels[target, route.index]
            width = widths.get((target, route.index), _LINE_WIDTH)
            _draw_edge(axes, grid, layout, route, port, label, width)


def _draw_edge(
    axes: Axes,
    grid: Grid,
    layout: Layout,
    route: Route,
    port: float,
    label: str,
    width: float,
) -> None:
    (_, i), (b, j) = layout.cells[route.source], layout.cells[route.target]
    colour = COLOURS["same" if i == j else "up" if i < j else "down"]
    style: dict[str, Any] = {"color": colour, "linewidth": width, "mutation_scale": 8, "zorder": 2}
    head = "-" if route.target.startswith("->") else "-|>"
    path = _outline(grid, layout, route, port)
    axes.add_patch(
        FancyArrowPatch(path=path, arrowstyle=head, shrinkA=0, shrinkB=0, fill=False, **style)
    )
    if label:
        box: dict[str, Any] = {"boxstyle": "round,pad=0.12", "facecolor": "white", "linewidth": 0.5}
        text: dict[str, Any] = {"fontsize": LABEL, "color": colour, "ha": "center", "va": "center"}
        x = (grid.left[b - 1] + grid.width[b - 1] + grid.left[b] - 0.08) / 2
        y = ((grid.track(route) if route.track else grid.middle[i]) + port) / 2
        axes.text(x, y, label, bbox={**box, "edgecolor": colour}, zorder=5, **text)


def _outline(grid: Grid, layout: Layout, route: Route, port: float) -> Outline:
    """An arrow's line, which enters its target's box at the height `port`."""
    (a, i), (b, _) = layout.cells[route.source], layout.cells[route.target]
    start, end = grid.left[a] + grid.width[a], grid.left[b]
    points, codes = [(start, grid.middle[i])], [Outline.MOVETO]

    def bend(x0: float, x1: float, y: float) -> None:
        """From the last point along its height to x0, then an S to (x1, y)."""
        last, middle = points[-1][1], (x0 + x1) / 2
        points.extend([(x0, last), (middle, last), (middle, y), (x1, y)])
        codes.extend([Outline.LINETO, *[Outline.CURVE4] * 3])

    if route.track is not None:
        bend(start + 0.02, grid.left[a + 1] - 0.04, grid.track(route))
    bend(grid.left[b - 1] + grid.width[b - 1] + 0.04, end - 0.12, port)
    return Outline([*points, (end, port)], [*codes, Outline.LINETO])


def _draw_box(axes: Axes, grid: Grid, column: int, row: int, lines: list[str], kind: str) -> None:
    """A node, or the mark of an output if `kind` is ""."""
    fill, border = KINDS[kind] if kind else (KINDS["output node"][1], "none")
    x, width, y = grid.left[column], grid.width[column], grid.middle[row]
    height = grid.height if kind else 0.27
    shape = "round,pad=0,rounding_size=0.07" if kind else "round,pad=0,rounding_size=0.13"
    style: dict[str, Any] = {"facecolor": fill, "edgecolor": border, "linewidth": 1.1, "zorder": 3}
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle=shape, **style))
    for number, line in enumerate(lines):
        at = y + ((len(lines) - 1) / 2 - number) * LINE
        size, weight = (NAME, "bold") if number == 0 else (DETAIL, "normal")
        colour = "white" if not kind else "#1f2933" if number == 0 else "#46525e"
        text: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": size,
            "weight": weight,
            "color": colour,
        }
        axes.text(x + width / 2, at - 0.008, line, zorder=4, **text)


def _draw_legend(
    figure: Figure,
    pyramid: GraphExecutor,
    layout: Layout,
    usual: Mapping[str, str],
    weighted: bool,
) -> None:
    found = {kind_of(pyramid, name) for name in layout.cells}
    handles: list[Patch | Line2D] = [
        Patch(facecolor=fill, edgecolor=border, label=kind)
        for kind, (fill, border) in KINDS.items()
        if kind in found
    ]
    rows = {(layout.cells[r.source][1], layout.cells[r.target][1]) for r in layout.routes}
    ways = {"same" if i == j else "up" if i < j else "down" for i, j in rows}
    for way in (way for way in COLOURS if way in ways):
        resampler = f" ({usual[way]})" if way in usual else ""
        handles.append(
            Line2D([], [], color=COLOURS[way], linewidth=1.4, label=WORDS[way] + resampler)
        )
    if weighted:
        handles.append(Line2D([], [], linestyle="", label="on an arrow: learned weight"))
    narrow = figure.get_figwidth() <= _NARROW
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=-(-len(handles) // 2) if narrow else len(handles),
        frameon=False,
        fontsize=DETAIL,
        columnspacing=1.4,
        handlelength=1.6,
    )
