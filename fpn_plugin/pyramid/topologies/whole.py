"""The pyramids whose main part is a step: it works on the maps of several levels at once."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Edge,
    Graph,
    Levels,
    Maps,
    Node,
    Step,
    Style,
    by_level,
    graph_of,
    node,
    op,
    prescribe,
    step,
)

INNER_LEVELS["msdeform"] = 0  # Deformable DETR's P6 is made only where it is asked for
_FINEST = 3  # of a transformer's levels: finer maps have too many pixels for it


@TOPOLOGIES.register("msdeform")
def msdeform(inputs: Levels, style: Style) -> Graph:
    """Mask2Former's pixel decoder, Cheng et al. 2021, arXiv:2112.01527: a transformer's encoder of
    multi-scale deformable attention (Deformable DETR, Zhu et al. 2020, arXiv:2010.04159).

    Every pixel of level 3 and coarser ones looks, six times, at a few points in all of these
    levels. Finer levels are added top-down. Deformable DETR has P6 too (`inner_levels=1`).

    ::

        T_l = lateral(C_l)                    l = 3, 4, …
        T_6 = 3x3 s2(C_5)                     if it is asked for
        P_3, P_4, … = encoder(T_3, T_4, …)
        P_2 = ReLU(block(fuse(lateral(C_2), bilinear(P_3))))
    """
    maps: Maps = by_level(inputs)
    nodes: list[Node | Step] = []
    seen = [level for level in maps if level >= _FINEST] or list(maps)
    fine = [level for level in maps if level not in seen]
    top, top_level = maps[max(maps)], max(maps)
    for level, name in maps.items() if style.first else ():
        maps[level] = f"msdeform_lateral{level}"
        hints = {} if level in fine else {"bias": True}
        lateral = prescribe(style.lateral, activation="", **hints)
        nodes.append(node(maps[level], level, [name], block=lateral))
    for level in range(top_level + 1, top_level + 1 + style.inner_levels):
        conv = op("conv3x3", stride=2, activation="", bias=True)
        maps[level] = f"msdeform_in{level}"
        nodes.append(node(maps[level], level, [top], block=conv))
        top = maps[level]
        seen.append(level)
    encoder = step("msdeform_encoder", {level: maps[level] for level in seen}, "msdeform")
    nodes.append(encoder)
    outputs = {level: name for name, level in encoder.maps().items()}
    for level in reversed(fine):
        above = Edge(outputs[min(outputs)], resample=op("bilinear"))
        outputs[level] = f"msdeform_output{level}"
        block = prescribe(style.block, activation=style.act("relu"))
        nodes.append(node(outputs[level], level, [maps[level], above], block=block))
    return graph_of(inputs, nodes, outputs)
