"""The catalogue: one pure function per variant that returns a `Graph`. Imports no torch.

A topology function takes its input maps as `{name: level}` and a `Style` with the blocks to use.
Node names are checkpoint keys: changing one breaks users' checkpoints.
"""

from fpn_plugin.pyramid.topologies import fpn, gather, neighbours, search, two_way, whole
from fpn_plugin.pyramid.topologies.base import INNER_LEVELS, TOPOLOGIES, Style, Topology

__all__ = [
    "INNER_LEVELS",
    "Style",
    "TOPOLOGIES",
    "Topology",
    "fpn",
    "gather",
    "neighbours",
    "search",
    "two_way",
    "whole",
]
