"""The pyramids of DETR-like detectors: RT-DETR's hybrid encoder."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    TOPOLOGIES,
    Graph,
    Levels,
    Style,
    graph_of,
    laterals,
    need_levels,
    node,
    op,
    prescribe,
)
from fpn_plugin.pyramid.topologies.yolo import bottom_up, reduced_top_down


@TOPOLOGIES.register("hybrid")
def hybrid(inputs: Levels, style: Style) -> Graph:
    """RT-DETR's hybrid encoder, Lv et al. 2023, arXiv:2304.08069.

    Attention between all pixels of the coarsest map (`aifi`), then a top-down and a bottom-up path.
    In RT-DETR `fuse` is `stack`, `block` is `csp_rep`, and `down` a 3x3; D-FINE
    (arXiv:2410.13842) and DEIMv2 (arXiv:2509.20787) have other blocks in the same wiring. Each
    convolution has a norm and, unless said otherwise, SiLU.

    ::

        X_l   = lateral(C_l), without activation
        T_top = aifi(X_top),  R_l = lateral(T_l)
        T_l   = block(fuse(up(R_{l+1}), X_l))
        P_min = T_min,  P_l = block(fuse(down(P_{l-1}), R_l))
    """
    need_levels("hybrid", inputs, 2)
    act = style.act("silu")
    block, reduce = (prescribe(each, activation=act) for each in (style.block, style.lateral))
    nodes, maps = laterals("hybrid", inputs, style, activation="")
    top = max(maps)
    nodes.append(node(f"hybrid_aifi{top}", top, [maps[top]], block=op("aifi")))
    maps[top] = nodes[-1].name
    down, middle = reduced_top_down("hybrid", maps, block, reduce)
    up, outputs = bottom_up("hybrid", middle, block)
    return graph_of(inputs, [*nodes, *down, *up], outputs)
