"""The maps inside a pyramid while it runs, and which of them a picture shows.

A map is recorded as its strength: the root mean square over the channels. Shapes are `(N, C, H, W)`
for maps and `(N, H, W)` for strengths.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping

from torch import Tensor, nn

from fpn_plugin.compat import uncompiled
from fpn_plugin.pyramid.graph import Node
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.pyramid.resolve import ResolvedNode

_MOST_FUSIONS = 3  # of a level of which each gets a row; of more, the first and the last
_ORDINALS = ("1st", "2nd", "3rd")


@dataclass
class RecordedMaps:
    """Strengths by name; they are there once the backbone has run.

    Attributes:
        levels: of every name.
        inputs: of the bottom-up maps.
        before: of the input from a fusing node's own level, as it reaches the fusion; by node.
        fused: of the fusion's result, before the node's block; by node.
        nodes: of the results of nodes and steps, by the names of the maps.
        outputs: of the backbone's outputs, by their names, "p2" and so on.
    """

    levels: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def strength(x: Tensor) -> Tensor:
    """The root mean square over the channels: `(N, C, H, W)` -> `(N, H, W)`, on the CPU."""
    return x.detach().float().square().mean(dim=1).sqrt().cpu()


@contextlib.contextmanager
def record_maps(backbone: nn.Module) -> Iterator[RecordedMaps]:
    """Inside, the maps of the backbone's latest run are recorded.

    Of a pyramid of this plugin these are each node's; of any other backbone its outputs, and those
    of its `bottom_up` network if it has one. What is compiled runs uncompiled, so that no map is
    fused away.
    """
    maps = RecordedMaps()
    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled())
        if isinstance(backbone, GraphExecutor):
            _record_nodes(backbone, maps, stack)
        _record_inputs_and_outputs(backbone, maps, stack)
        yield maps


def _record_inputs_and_outputs(
    backbone: Any, maps: RecordedMaps, stack: contextlib.ExitStack
) -> None:
    """The bottom-up maps that are read, and the outputs."""
    outputs = backbone.output_shape()
    maps.levels.update({name: _level(shape.stride) for name, shape in outputs.items()})

    def record_outputs(module: nn.Module, args: Any, results: Mapping[str, Tensor]) -> None:
        maps.outputs = {name: strength(results[name]) for name in outputs}

    stack.callback(backbone.register_forward_hook(record_outputs).remove)
    bottom_up = getattr(backbone, "bottom_up", None)
    if bottom_up is None:
        return
    shapes = bottom_up.output_shape()
    graph = getattr(backbone, "graph", None)
    names = list(shapes) if graph is None else list(graph.inputs)
    maps.levels.update({name: _level(shapes[name].stride) for name in names})

    def record_inputs(module: nn.Module, args: Any, results: Mapping[str, Tensor]) -> None:
        maps.inputs = {name: strength(results[name]) for name in names}

    stack.callback(bottom_up.register_forward_hook(record_inputs).remove)


def _level(stride: int) -> int:
    return stride.bit_length() - 1


def _record_nodes(executor: GraphExecutor, maps: RecordedMaps, stack: contextlib.ExitStack) -> None:
    maps.levels.update(executor.graph.inputs)
    for step in executor.steps:
        maps.levels.update(step.node.maps())
        if step.fuse is not None:
            _record_fusion(executor.get_submodule(step.fuse.path), step, maps, stack)
        *_, last = [None, *step.parts()]
        if last is not None:
            hook = _recorder(maps.nodes, *step.node.maps())
            stack.callback(executor.get_submodule(last.path).register_forward_hook(hook).remove)


def _record_fusion(
    fusion: nn.Module, step: ResolvedNode, maps: RecordedMaps, stack: contextlib.ExitStack
) -> None:
    name, index = step.node.name, same_level_input(step)

    def record_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        maps.before[name] = strength(args[0][index])

    if index is not None:
        stack.callback(fusion.register_forward_pre_hook(record_input).remove)
    stack.callback(fusion.register_forward_hook(_recorder(maps.fused, name)).remove)


def _recorder(strengths: dict[str, Tensor], *names: str) -> Any:
    """A hook that records the map, or maps, that a module gives."""

    def record(module: nn.Module, args: Any, output: Tensor | list[Tensor]) -> None:
        results = [output] if isinstance(output, Tensor) else output
        strengths.update({name: strength(x) for name, x in zip(names, results)})

    return record


def same_level_input(step: ResolvedNode) -> int | None:
    """The number of a node's input from its own level: the first that is not resampled."""
    return next((i for i, edge in enumerate(step.edges) if edge.resample is None), None)


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


def map_rows(backbone: Any, maps: RecordedMaps, image: int = 0) -> list[Row]:
    """The maps to show, stage by stage on the way through the pyramid.

    However large the graph, these are few: the bottom-up maps, what reaches the first fusion of
    each level from that level, what the first and the last fusion of each level give (all, if there
    are up to three), the outputs.

    Args:
        image: its number in the batch.
    """
    rows: list[Row] = []
    for name, strengths in maps.inputs.items():
        level = maps.levels[name]
        row = next((row for row in rows if level not in row.cells), None)
        if row is None:  # a plain ViT has several maps of one level
            row = Row("bottom-up map")
            rows.append(row)
        row.cells[level] = Cell(name, strengths[image])
    nodes: Mapping[str, str] = {}  # by output
    if isinstance(backbone, GraphExecutor):
        rows += _fusion_rows(backbone, maps, image)
        nodes = backbone.graph.output_names()
    outputs = Row("output, after the block" if nodes else "output")
    for name, strengths in maps.outputs.items():
        title = f"{name}: {nodes[name]}" if name in nodes else name
        outputs.cells[maps.levels[name]] = Cell(title, strengths[image])
    return [row for row in [*rows, outputs] if row.cells]


def _fusion_rows(executor: GraphExecutor, maps: RecordedMaps, image: int) -> list[Row]:
    """The rows before the first fusion of each level, and after its fusions."""
    by_level: dict[int, list[ResolvedNode]] = {}
    for step in executor.steps:
        if step.fuse is not None and isinstance(step.node, Node):
            by_level.setdefault(step.node.input_level, []).append(step)
    if not by_level:
        return []
    before = Row("before fusion")
    for level in sorted(set(maps.levels.values())):
        cell = _before_fusion(executor, maps, image, level, by_level.get(level, []))
        if cell is not None:
            before.cells[level] = cell
    most = max(map(len, by_level.values()))
    after = [Row(title) for title in _after_titles(most)]
    for level, steps in by_level.items():
        shown = steps if most <= _MOST_FUSIONS else [steps[0], *steps[1:][-1:]]
        for row, step in zip(after, shown):
            name, number = step.node.name, steps.index(step) + 1
            numbered = most > _MOST_FUSIONS and number > 1
            title = f"{name} (fusion {number})" if numbered else name
            row.cells[level] = Cell(title, maps.fused[name][image])
    return [before, *after]


def _after_titles(most: int) -> list[str]:
    if most == 1:
        return ["after fusion"]
    if most <= _MOST_FUSIONS:
        return [f"after {ordinal} fusion" for ordinal in _ORDINALS[:most]]
    return ["after 1st fusion", "after last fusion"]


def _before_fusion(
    executor: GraphExecutor, maps: RecordedMaps, image: int, level: int, steps: list[ResolvedNode]
) -> Cell | None:
    """What a level's first fusion (of `steps`) gets from that level; of a level without one, the
    map of its first inner node, such as a lateral."""
    index = same_level_input(steps[0]) if steps else None
    if index is not None:
        edge = steps[0].edges[index]
        title = f"{edge.source}, projected" if any(edge.parts()) else edge.source
        return Cell(title, maps.before[steps[0].node.name][image])
    for step in executor.steps:
        for name, its_level in step.node.maps().items():
            inner = name not in executor.graph.outputs and step.fuse is None
            if its_level == level and inner and name in maps.nodes:
                return Cell(name, maps.nodes[name][image])
    return None
