"""Pyramids as graphs: the data (`graph`, `topologies`), the operators, and the module that runs
them.

What an extension needs is importable from here: the registries, the base classes of their entries,
and what a topology is written with.
"""

from fpn_plugin.pyramid import (  # noqa: F401  (they register)
    blocks_attention,
    downsample,
    frequency,
)
from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, conv_block
from fpn_plugin.pyramid.fusion import FUSIONS, Fusion
from fpn_plugin.pyramid.graph import Edge, Graph, Node, Operator, Step, node, op, step
from fpn_plugin.pyramid.norms import NORMS, norm_layer
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE, Resampler
from fpn_plugin.pyramid.steps import STEPS
from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Levels,
    Style,
    by_level,
    graph_of,
)

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "DOWNSAMPLE",
    "Edge",
    "FUSIONS",
    "Fusion",
    "Graph",
    "INNER_LEVELS",
    "Levels",
    "NORMS",
    "Node",
    "Operator",
    "Pyramid",
    "Resampler",
    "STEPS",
    "Step",
    "Style",
    "TOPOLOGIES",
    "UPSAMPLE",
    "by_level",
    "conv_block",
    "graph_of",
    "node",
    "norm_layer",
    "op",
    "step",
]
