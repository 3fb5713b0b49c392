"""The catalogue: one pure function per variant that returns a `Graph`. This module imports no
torch.

A topology function takes the bottom-up maps as `{name: level}` from high to low resolution and a
`Style` with the blocks to use. Node names are checkpoint keys: changing one breaks users'
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping

from fpn_plugin.pyramid.graph import Graph, Node, Operator, node
from fpn_plugin.registry import Registry

Topology = Callable[[Mapping[str, int], "Style"], Graph]
TOPOLOGIES: Registry[Topology] = Registry("topology")


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
