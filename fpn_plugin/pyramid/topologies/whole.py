"""The pyramids that are one step over the maps of another."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Graph,
    Levels,
    Style,
    add_inner_levels,
    by_level,
    graph_of,
    need_levels,
    op,
    step,
)

INNER_LEVELS["dyhead"] = 0  # its authors' P6 and P7 are made only where they are asked for
INNER_LEVELS["sepc"] = 0


@TOPOLOGIES.register("dyhead")
def dyhead(inputs: Levels, style: Style) -> Graph:
    """Dynamic head, Dai et al. 2021, arXiv:2106.08322.

    After another pyramid: six blocks of attention over places, scales and channels, with weights
    that all levels share; see the step `dyhead`. The paper's is `fpn+dyhead`; its authors' code makes
    P6 and P7 before (`inner_levels=2`, `downsample="conv"`), so that they take part. It takes the
    place of the convolutions in a one-stage head: set their number to 0.
    """
    return _alone("dyhead", inputs, style)


@TOPOLOGIES.register("sepc")
def sepc(inputs: Levels, style: Style) -> Graph:
    """Scale-equalizing pyramid convolution, Wang et al. 2020, arXiv:2005.03101.

    After another pyramid: four convolutions over levels and places; see the step `sepc`. The paper's
    is `fpn+sepc`, with P6 and P7 made before (`inner_levels=2`, `downsample="conv"`).
    """
    return _alone("sepc", inputs, style)


def _alone(name: str, inputs: Levels, style: Style) -> Graph:
    """A step on all inputs, and on the coarser levels that are asked for."""
    need_levels(name, inputs, 2, style.inner_levels)
    maps = by_level(inputs)
    nodes = add_inner_levels(name, maps, style.inner_levels)
    last = step(name, maps, op(name))
    outputs = {level: output for output, level in last.maps().items()}
    return graph_of(inputs, [*nodes, last], outputs)
