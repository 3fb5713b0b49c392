"""The catalogue: one pure function per variant that returns a `Graph`. This module imports no
torch.

A topology function takes the bottom-up maps as `{name: level}` from high to low resolution and a
`Style` with the blocks to use. Node names are checkpoint keys: changing one breaks users'
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping

from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, chain, node, op
from fpn_plugin.registry import Registry, unknown_name

Topology = Callable[[Mapping[str, int], "Style"], Graph]
TOPOLOGIES: Registry[Topology] = Registry("topology")
EXTRA_LEVELS = ("none", "maxpool", "conv_c5", "conv_p5")


@dataclass(frozen=True)
class Style:
    """The blocks that a topology uses: on each bottom-up map, and for each output."""

    lateral: Operator = Operator("conv1x1")
    block: Operator = Operator("conv3x3")


@TOPOLOGIES.register("fpn")
def fpn(inputs: Mapping[str, int], style: Style) -> Graph:
    """Feature Pyramid Network, Lin et al. 2017, arXiv:1612.03144.

    `M_l = fuse(lateral_l, up(M_{l+1}))`, `P_l = block(M_l)`. The names of the convolutions are
    Detectron2's.
    """
    nodes: list[Node] = []
    above = ""
    for name, level in reversed(list(inputs.items())):
        lateral = f"fpn_lateral{level}"
        nodes.append(node(lateral, level, [name], block=style.lateral))
        if above:
            nodes.append(node(f"fpn_merge{level}", level, [lateral, above]))
        above = nodes[-1].name
        nodes.append(node(f"fpn_output{level}", level, [above], block=style.block))
    return Graph(inputs, tuple(nodes), tuple(f"fpn_output{level}" for level in inputs.values()))


@TOPOLOGIES.register("channel_mapper")
def channel_mapper(inputs: Mapping[str, int], style: Style) -> Graph:
    """The baseline without fusion: each map is brought to the common width, nothing passes between
    levels."""
    nodes = tuple(
        node(f"mapper{level}", level, [name], block=style.block) for name, level in inputs.items()
    )
    return Graph(inputs, nodes, tuple(item.name for item in nodes))


def build_graph(
    topology: str,
    inputs: Mapping[str, int],
    style: Style = Style(),
    repeats: int = 1,
    extra_levels: str = "none",
) -> Graph:
    """The graph of a catalogue topology, repeated, with its extra levels.

    Args:
        inputs: bottom-up maps as `{name: level}` from high to low resolution.
        repeats: how often the topology runs; run number r > 1 puts `r{r}_` before its node names.
        extra_levels: one of `EXTRA_LEVELS`.

    Raises:
        ValueError: (KeyError for an unknown topology) naming the config key.
    """
    build = TOPOLOGIES.get(topology, "MODEL.FPN.TOPOLOGY")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"MODEL.FPN.REPEATS: {repeats!r} is not a whole number of 1 or more")
    graph = build(inputs, style)
    for run in range(2, repeats + 1):
        levels = {f"p{graph.level(name)}": graph.level(name) for name in graph.outputs}
        graph = chain(graph, build(levels, style), f"r{run}_")
    return add_extra_levels(graph, extra_levels)


def add_extra_levels(graph: Graph, kind: str) -> Graph:
    """Append levels coarser than the graph's coarsest output. The names are those of Detectron2's
    `top_block`.

    Args:
        kind: "none"; "maxpool": one level, the top output subsampled (Mask R-CNN); "conv_c5" and
            "conv_p5": two levels by 3x3 convolutions with stride 2, from the top input (RetinaNet)
                or the top output (FCOS).

    Raises:
        ValueError: naming MODEL.FPN.EXTRA_LEVELS.
    """
    where = "MODEL.FPN.EXTRA_LEVELS"
    if kind not in EXTRA_LEVELS:
        raise unknown_name(where, kind, EXTRA_LEVELS)
    if kind == "none":
        return graph
    top = graph.outputs[-1]
    level = graph.level(top)
    names = [f"top_block.p{level + 1}", f"top_block.p{level + 2}"]
    if kind == "maxpool":
        nodes = [node(names[0], level + 1, [Edge(top, resample=Operator("subsample"))])]
    else:
        source = top if kind == "conv_p5" else max(graph.inputs, key=graph.inputs.__getitem__)
        if graph.level(source) != level:
            raise ValueError(
                f"{where}: {kind!r} reads {source!r} of level {graph.level(source)}, but"
                " the pyramid's top output"
                f" is of level {level}: use 'conv_p5'"
            )
        conv = op("conv3x3", stride=2, norm="", activation="")
        after_relu = op("conv3x3", stride=2, norm="", activation="relu", order="act-conv-norm")
        nodes = [node(names[0], level + 1, [source], block=conv)]
        nodes += [node(names[1], level + 2, [names[0]], block=after_relu)]
    return Graph(
        graph.inputs, graph.nodes + tuple(nodes), graph.outputs + tuple(item.name for item in nodes)
    )
