"""What a graph's defaults come to: every resampler, projection, fusion and channel count made
explicit.

This module imports no torch. The executor builds from it, and `fpn show` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, Step, op

# The fusion that gives the widths of all its inputs together; every other gives the pyramid's width
WIDENING = "stack"


@dataclass(frozen=True)
class Defaults:
    """What a node or edge gets that does not say otherwise.

    Attributes:
        channels: of every map inside the pyramid.
        norm: of every block, projection, fusion and resampler that has convolutions.
        activation: of every block of a node or edge.
        norm_eps: of every normalisation layer. 0 for the layer's own default.
        norm_momentum: of every one that keeps running statistics. 0 for the layer's own default.
    """

    channels: int
    fuse: Operator = Operator("sum")
    upsample: Operator = Operator("nearest")
    downsample: Operator = Operator("maxpool")
    norm: str = ""
    activation: str = ""
    norm_eps: float = 0.0
    norm_momentum: float = 0.0


@dataclass(frozen=True)
class ModuleSpec:
    """One module: the submodule's path, its operator, and what it is built from.

    Attributes:
        kind: "block", "fuse", "up", "down" or "step".
        amount: the number of maps for a fusion or step, of levels for a resampler; 0 for a block.
        where: the place in the graph, for error messages.
        levels: of the inputs of a fusion or step: the level that each comes from.
        widths: of a fusion's inputs: the channels that each arrives with.
    """

    path: str
    kind: str
    operator: Operator
    in_channels: int
    out_channels: int
    amount: int
    where: str
    levels: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ResolvedEdge:
    """An edge with every part that it really has; None where it has none."""

    source: str
    project: ModuleSpec | None
    resample: ModuleSpec | None
    block: ModuleSpec | None

    def parts(self) -> Iterator[ModuleSpec]:
        """In the order in which they run."""
        return (part for part in (self.project, self.resample, self.block) if part is not None)


@dataclass(frozen=True)
class ResolvedNode:
    """A node or step with every part that it really has, and the maps that nobody reads after it.

    What a step does is its `block`; it has no fusion.
    """

    node: Node | Step
    edges: tuple[ResolvedEdge, ...]
    fuse: ModuleSpec | None
    block: ModuleSpec | None
    drop: tuple[str, ...]

    def parts(self) -> Iterator[ModuleSpec]:
        """In the order in which they run."""
        for edge in self.edges:
            yield from edge.parts()
        yield from (part for part in (self.fuse, self.block) if part is not None)


def resolve(
    graph: Graph,
    in_channels: Mapping[str, int],
    defaults: Defaults,
    per_node: Mapping[str, Defaults] | None = None,
) -> tuple[ResolvedNode, ...]:
    """Make a checked graph explicit.

    Every node gives `defaults.channels` channels. Where a bottom-up map has others, the node's own
    block changes them if the node has one input; where maps are fused or the block is the identity,
    each edge gets a 1x1 convolution of its own (as in the first cell of EfficientDet,
    arXiv:1911.09070), unless it says `project: identity`: then it keeps the channels of its source.
    Where they are fused by `stack`, the node's block gets the sum of what its edges deliver. A step
    reads maps of `defaults.channels` channels and gives such; others get the 1x1 convolution too.

    Args:
        in_channels: of the graph's inputs, by name.
        per_node: other defaults, of the same width, for single nodes, by the node's name.

    Raises:
        ValueError: naming a node that is fused by `stack` and has no block to take its width, or a
            step with an edge of another width.
    """
    common, channels = defaults, dict(in_channels)
    levels = dict(graph.inputs)
    last_reader = {edge.source: node.name for node in graph.nodes for edge in node.inputs}
    resolved = []
    for node in graph.nodes:
        defaults = (per_node or {}).get(node.name, common)
        edges = tuple(
            _resolve_edge(node, i, levels, channels, defaults) for i in range(len(node.inputs))
        )
        widths = tuple(_width(edge, channels, defaults) for edge in edges)
        fuse: ModuleSpec | None = None
        block: ModuleSpec | None
        if isinstance(node, Step):
            block = _step(node, widths, defaults.channels)
        else:
            fuse = _fusion(node, levels, widths, defaults) if len(edges) > 1 else None
            block = _last_block(node, fuse, widths[0], defaults.channels)
        read = dict.fromkeys(edge.source for edge in node.inputs)
        unread = [name for name in node.maps() if name not in last_reader]
        drop = tuple(
            name
            for name in [*read, *unread]
            if last_reader.get(name, node.name) == node.name and name not in graph.outputs
        )
        resolved.append(ResolvedNode(node, edges, fuse, block, drop))
        channels.update(dict.fromkeys(node.maps(), defaults.channels))
        levels.update(node.maps())
    return tuple(resolved)


def _step(step: Step, widths: tuple[int, ...], channels: int) -> ModuleSpec:
    where, count = f"step {step.name!r}", len(widths)
    for edge, width in zip(step.inputs, widths):
        if width != channels:
            raise ValueError(
                f"{where}, input {edge.source!r}: it has {width} channels, but the pyramid"
                f" {channels}; project it (leave out project: identity)"
            )
    return ModuleSpec(
        step.name, "step", step.operator, channels, channels, count, where, step.levels, widths
    )


def _last_block(
    node: Node, fuse: ModuleSpec | None, width: int, channels: int
) -> ModuleSpec | None:
    """The node's own block; None if it has nothing to do."""
    width = fuse.out_channels if fuse else width
    if fuse and _is_identity(node.block) and width != channels:
        raise ValueError(
            f"node {node.name!r}, block: identity, but {fuse.operator} gives {width} channels"
            f" and the pyramid has {channels}: give the node a block (conv1x1, csp,"
            " ...), or fuse by concat, which ends in a 1x1 convolution"
        )
    return _block(node.name, node.block, width, channels, f"node {node.name!r}, block")


def _width(edge: ResolvedEdge, channels: Mapping[str, int], defaults: Defaults) -> int:
    """The channels that an edge delivers."""
    if edge.resample and not edge.block:
        return edge.resample.out_channels
    return defaults.channels if edge.project or edge.block else channels[edge.source]


def _fusion(
    node: Node, levels: Mapping[str, int], widths: tuple[int, ...], defaults: Defaults
) -> ModuleSpec:
    sources = tuple(levels[edge.source] for edge in node.inputs)
    path, where, width = f"{node.name}_fuse", f"node {node.name!r}, fuse", defaults.channels
    operator = node.fuse or defaults.fuse
    result = sum(widths) if operator.name == WIDENING else width
    return ModuleSpec(path, "fuse", operator, width, result, len(widths), where, sources, widths)


def _block(
    path: str, operator: Operator | None, width: int, channels: int, where: str
) -> ModuleSpec | None:
    if operator is None or (_is_identity(operator) and width == channels):
        return None
    return ModuleSpec(path, "block", operator, width, channels, 0, where)


def _is_identity(operator: Operator | None) -> bool:
    return operator is not None and operator.name == "identity" and not operator.args


def _resolve_edge(
    node: Node | Step,
    index: int,
    levels: Mapping[str, int],
    channels: Mapping[str, int],
    defaults: Defaults,
) -> ResolvedEdge:
    """What input number `index` of a node or step passes: `block(resample(project(source)))`.

    Args:
        levels: and `channels`: of the maps that are there already, by name.
    """
    edge = node.inputs[index]
    kind = "step" if isinstance(node, Step) else "node"
    path, where = f"{node.name}_edge{index}", f"{kind} {node.name!r}, input {edge.source!r}"
    # 1. How many levels the map has to move: > 0 up to a finer one, < 0 down, 0 stays.
    width = channels[edge.source]
    steps = 0 if isinstance(node, Step) else levels[edge.source] - node.input_level
    operator = edge.resample or (defaults.upsample if steps > 0 else defaults.downsample)
    # ViTDet's upsamplers halve the channels with each level. Then a projection comes after them.
    shrinks = steps > 0 and bool(dict(operator.args).get("shrink"))
    # 2. The projection: what the edge says, or a 1x1 convolution where the channels need one. An
    # edge's `identity` keeps the source's channels, even where they are not the pyramid's.
    projection = edge.project
    if projection is None and not shrinks:
        projection = _default_projection(node, edge, width, defaults)
    if _is_identity(projection):
        projection = None
    project = _block(f"{path}.project", projection, width, defaults.channels, f"{where}, project")
    width = defaults.channels if project else width
    # 3. The resampler, which keeps the channels unless it shrinks.
    resample = None
    if steps:
        wide = width
        width >>= halvings(dict(operator.args), width, steps) if shrinks else 0
        resample = ModuleSpec(
            f"{path}.resample",
            "up" if steps > 0 else "down",
            operator,
            wide,
            width,
            abs(steps),
            f"{where}, resample",
        )
    # 4. The block after it: what the edge says, or the projection that a shrinking one put off.
    following = edge.block
    if following is None and shrinks and not _is_identity(edge.project):
        following = _default_projection(node, edge, width, defaults)
    if _is_identity(following):
        following = None
    block = _block(f"{path}.block", following, width, defaults.channels, f"{where}, block")
    return ResolvedEdge(edge.source, project, resample, block)


def halvings(arguments: Mapping[str, Any], width: int, steps: int) -> int:
    """How often an upsampler with these arguments halves the channels of a map of that width."""
    if not arguments.get("shrink"):
        return 0
    limit = arguments.get("reduce_above")
    return steps + int(type(limit) is int and 0 < limit < width)


def _default_projection(
    node: Node | Step, edge: Edge, width: int, defaults: Defaults
) -> Operator | None:
    """A 1x1 convolution without activation, where nothing later on the way changes the channels."""
    changed_later = (edge.block or Operator("identity")).name != "identity" or (
        isinstance(node, Node) and len(node.inputs) == 1 and node.block.name != "identity"
    )
    if width == defaults.channels or changed_later:
        return None
    return op("conv1x1", activation="")
