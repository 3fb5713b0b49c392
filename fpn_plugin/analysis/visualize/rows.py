"""Which of a pyramid's maps are shown: rows are stages of the way through it, columns are levels.

However large the graph: what comes in, what reaches the first fusion from a node's own level, what
the first and the last fusion of each level give (all, if there are up to three), what goes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

from torch import Tensor

from fpn_plugin.analysis.visualize.maps import Recorded, own_input
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedNode

_MOST = 3  # fusions of a level of which each gets a row of its own
_ORDINALS = ("1st", "2nd", "3rd")


@dataclass(frozen=True)
class Cell:
    """One map: its name, and its strength `(H, W)`."""

    name: str
    strength: Tensor


@dataclass(frozen=True)
class Row:
    """The maps of one stage, by level."""

    title: str
    cells: dict[int, Cell] = field(default_factory=dict)


def rows_of(backbone: Any, maps: Recorded, image: int = 0) -> list[Row]:
    """The rows of a backbone's latest run, in the order of the way through it.

    Args:
        image: its number in the batch.
    """
    inputs = Row("bottom-up map")
    for name, strengths in maps.inputs.items():
        inputs.cells[maps.levels[name]] = Cell(name, strengths[image])
    rows = [inputs]
    names: Mapping[str, str] = {}
    if isinstance(backbone, GraphExecutor):
        rows += _fusion_rows(backbone, maps, image)
        names = backbone.graph.output_names()
    outputs = Row("output, after the block" if names else "output")
    for name, strengths in maps.outputs.items():
        title = f"{name}: {names[name]}" if name in names else name
        outputs.cells[maps.levels[name]] = Cell(title, strengths[image])
    return [row for row in [*rows, outputs] if row.cells]


def _fusion_rows(executor: GraphExecutor, maps: Recorded, image: int) -> list[Row]:
    """Before the first fusion of each level, and after its fusions."""
    by_level: dict[int, list[ResolvedNode]] = {}
    for step in executor.steps:
        if step.fuse is not None:
            by_level.setdefault(step.node.input_level, []).append(step)
    if not by_level:
        return []
    before = Row("before fusion")
    for level in sorted(set(maps.levels.values())):
        cell = _before(executor, maps, image, level, by_level.get(level, []))
        if cell is not None:
            before.cells[level] = cell
    most = max(map(len, by_level.values()))
    after = [Row(title) for title in _titles(most)]
    for level, steps in by_level.items():
        shown = steps if most <= _MOST else [steps[0], *steps[1:][-1:]]
        for row, step in zip(after, shown):
            name = step.node.name
            number = steps.index(step) + 1
            title = name if most <= _MOST or number == 1 else f"{name} (fusion {number})"
            row.cells[level] = Cell(title, maps.fused[name][image])
    return [before, *after]


def _titles(most: int) -> list[str]:
    if most == 1:
        return ["after fusion"]
    if most <= _MOST:
        return [f"after {_ORDINALS[i]} fusion" for i in range(most)]
    return ["after 1st fusion", "after last fusion"]


def _before(
    executor: GraphExecutor, maps: Recorded, image: int, level: int, steps: list[ResolvedNode]
) -> Cell | None:
    """What the level's first fusion gets from it; else its first node's map, as a lateral's."""
    own = own_input(steps[0]) if steps else None
    if own is not None:
        edge, name = steps[0].edges[own], steps[0].node.name
        title = f"{edge.source}, projected" if any(edge.parts()) else edge.source
        return Cell(title, maps.before[name][image])
    for step in executor.steps:
        name, inner = step.node.name, step.node.name not in executor.graph.outputs
        if step.node.level == level and step.fuse is None and inner and name in maps.nodes:
            return Cell(name, maps.nodes[name][image])
    return None
