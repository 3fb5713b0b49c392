"""The catalogue: one pure function per variant that returns a `Graph`. Imports no torch.

A topology function takes its input maps as `{name: level}` and a `Style` with the blocks to use.
Node names are checkpoint keys: changing one breaks users' checkpoints.
"""

from fpn_plugin.pyramid.topologies import (
    detr,
    fpn,
    gather,
    neighbours,
    one_level,
    search,
    two_way,
    whole,
    yolo,
)
from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    OWN_LEVELS,
    TOPOLOGIES,
    Style,
    Topology,
)

__all__ = ["INNER_LEVELS", "OWN_LEVELS", "Style", "TOPOLOGIES", "Topology"]
__all__ += ["detr", "fpn", "gather", "neighbours", "one_level", "search", "two_way", "whole"]
__all__ += ["yolo"]
