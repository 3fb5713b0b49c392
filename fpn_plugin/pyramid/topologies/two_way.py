"""The pyramids with a bottom-up path after the top-down one: PANet, BiFPN, QuFPN."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Edge,
    Graph,
    Levels,
    Maps,
    Node,
    Operator,
    Style,
    add_inner_levels,
    by_level,
    graph_of,
    need_levels,
    node,
    op,
    prescribe,
)
from fpn_plugin.pyramid.topologies.fpn import top_down


@TOPOLOGIES.register("pafpn")
def pafpn(inputs: Levels, style: Style) -> Graph:
    """PANet's path aggregation, Liu et al. 2018, arXiv:1803.01534.

    A bottom-up path after FPN's top-down one: the fine maps' detail reaches the coarse levels in a
    few convolutions instead of through the whole network. With the paper's ReLU.

    ::

        N_min   = P_min   (P: FPN's outputs)
        N_{l+1} = ReLU(block(fuse(P_{l+1}, ReLU(3x3 s2(N_l)))))
    """
    nodes, maps = top_down(inputs, style)
    act = style.act("relu")
    down = op("conv", activation=act)
    levels = sorted(maps)
    for below, level in zip(levels, levels[1:]):
        sources: list[str | Edge] = [maps[level], Edge(maps[below], resample=down)]
        block = prescribe(style.block, activation=act)
        maps[level] = f"pafpn_output{level}"
        nodes.append(node(maps[level], level, sources, block=block))
    return graph_of(inputs, nodes, maps)


@TOPOLOGIES.register("pafpn_mmdet")
def pafpn_mmdet(inputs: Levels, style: Style) -> Graph:
    """Path aggregation, as MMDetection has it.

    The bottom-up path sums before the output convolutions, which are outside of the recursion, and
    there is no activation. It has the same parameters as `pafpn`, in another order.

    ::

        I_min   = P_min   (P: FPN's outputs)
        I_{l+1} = fuse(P_{l+1}, 3x3 s2(I_l))
        N_min   = I_min,   N_l = block(I_l)
    """
    nodes, maps = top_down(inputs, style)
    levels = sorted(maps)
    outputs: Maps = {levels[0]: maps[levels[0]]}
    for below, level in zip(levels, levels[1:]):
        sources: list[str | Edge] = [maps[level], Edge(maps[below], resample=op("conv"))]
        maps[level] = f"pafpn_merge{level}"
        nodes.append(node(maps[level], level, sources))
        outputs[level] = f"pafpn_output{level}"
        nodes.append(node(outputs[level], level, [maps[level]], block=style.block))
    return graph_of(inputs, nodes, outputs)


def _down_then_up(prefix: str, maps: Maps, block: Operator) -> tuple[list[Node], Maps]:
    """BiFPN's cell: a top-down path, then a bottom-up path that reads the inputs again."""
    nodes: list[Node] = []
    levels = sorted(maps)
    middle = {levels[-1]: maps[levels[-1]]}
    for level, above in reversed(list(zip(levels[:-1], levels[1:]))):
        # the finest level has no second node: its top-down map is its output
        middle[level] = f"{prefix}_{'out' if level == levels[0] else 'td'}{level}"
        nodes.append(node(middle[level], level, [maps[level], middle[above]], block=block))
    outputs = {levels[0]: middle[levels[0]]}
    for below, level in zip(levels, levels[1:]):
        sources = list(dict.fromkeys([maps[level], middle[level], outputs[below]]))
        outputs[level] = f"{prefix}_out{level}"
        nodes.append(node(outputs[level], level, sources, block=block))
    return nodes, outputs


def _up_then_down(prefix: str, maps: Maps, block: Operator) -> tuple[list[Node], Maps]:
    """The mirror of BiFPN's cell: a bottom-up path, then a top-down path that reads the inputs."""
    nodes: list[Node] = []
    levels = sorted(maps)
    middle = {levels[0]: maps[levels[0]]}
    for below, level in zip(levels, levels[1:]):
        middle[level] = f"{prefix}_{'out' if level == levels[-1] else 'bu'}{level}"
        nodes.append(node(middle[level], level, [maps[level], middle[below]], block=block))
    outputs = {levels[-1]: middle[levels[-1]]}
    for level, above in reversed(list(zip(levels[:-1], levels[1:]))):
        sources = list(dict.fromkeys([maps[level], middle[level], outputs[above]]))
        outputs[level] = f"{prefix}_out{level}"
        nodes.append(node(outputs[level], level, sources, block=block))
    return nodes, outputs


INNER_LEVELS["bifpn"] = INNER_LEVELS["qufpn"] = 5


@TOPOLOGIES.register("bifpn")
def bifpn(inputs: Levels, style: Style) -> Graph:
    """EfficientDet's weighted bi-directional pyramid, Tan et al. 2020, arXiv:1911.09070.

    One cell is a top-down path and a bottom-up path that reads the inputs again; the paper repeats
    it, fuses by learned weights (`fast_normalized`) and convolves separably. Where the inputs'
    channels differ from the width, every edge has a projection of its own. It counts few operations
    but has many small ones.

    ::

        T_top = X_top,  T_l = block(swish(fuse(X_l, up(T_{l+1}))))
        P_min = T_min,  P_l = block(swish(fuse(X_l, T_l, down(P_{l-1}))))
    """
    need_levels("bifpn", inputs, 2, style.inner_levels)
    maps = by_level(inputs)
    nodes = add_inner_levels("bifpn", maps, style.inner_levels)
    cell, outputs = _down_then_up("bifpn", maps, style.pre_activated("swish"))
    return graph_of(inputs, nodes + cell, outputs)


@TOPOLOGIES.register("qufpn")
def qufpn(inputs: Levels, style: Style) -> Graph:
    """Quad FPN, google/automl.

    BiFPN's cell and its mirror (bottom-up first, then top-down) from the same inputs, added level
    by level. The additions are always fast-normalised; fuse, block and norm otherwise as in
    `bifpn`.

    ::

        A = BiFPN's cell (top-down, bottom-up),  B = its mirror (bottom-up, top-down)
        P_l = block(swish(fast_normalized(A_l, B_l)))
    """
    need_levels("qufpn", inputs, 3, style.inner_levels)
    maps = by_level(inputs)
    nodes = add_inner_levels("qufpn", maps, style.inner_levels)
    block = style.pre_activated("swish")
    first, down_up = _down_then_up("qufpn_a", maps, block)
    second, up_down = _up_then_down("qufpn_b", maps, block)
    outputs = {level: f"qufpn_out{level}" for level in maps}
    added = [
        node(outputs[level], level, [down_up[level], up_down[level]], "fast_normalized", block)
        for level in maps
    ]
    return graph_of(inputs, nodes + first + second + added, outputs)
