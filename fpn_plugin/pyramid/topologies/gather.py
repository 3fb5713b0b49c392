"""The pyramids that bring all levels together: HRFPN, Libra R-CNN's, ASFF."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Edge,
    Graph,
    Levels,
    Style,
    add_inner_levels,
    by_level,
    graph_of,
    need_levels,
    node,
    op,
)

INNER_LEVELS["hrfpn"] = 5
INNER_LEVELS["bfp"] = 0  # its authors' P6 is made only where it is asked for


@TOPOLOGIES.register("hrfpn")
def hrfpn(inputs: Levels, style: Style) -> Graph:
    """HRNet's pyramid HRNetV2p, Sun et al. 2019, arXiv:1904.04514.

    All maps are brought bilinearly to the finest, concatenated as they are, and reduced by a 1x1;
    that one map is average-pooled to each level, where a block follows. Everything happens at the
    finest level, which makes it costly on wide networks.

    ::

        X   = 1x1(concat(C_min, up(C_{min+1}), …))
        P_l = block(avgpool(X, 2**(l-min)))
    """
    maps = by_level(inputs)
    finest = min(maps)
    keep = op("identity")
    edges = [
        Edge(name, project=keep, resample=op("bilinear") if level > finest else None)
        for level, name in maps.items()
    ]
    nodes = [node("hrfpn_reduce", finest, edges, "concat")]
    levels = [*maps, *range(max(maps) + 1, max(maps) + 1 + style.inner_levels)]
    outputs = {level: f"hrfpn_output{level}" for level in levels}
    for level, name in outputs.items():
        edge = Edge("hrfpn_reduce", resample=op("avgpool") if level > finest else None)
        nodes.append(node(name, level, [edge], block=style.block))
    return graph_of(inputs, nodes, outputs)


@TOPOLOGIES.register("bfp")
def bfp(inputs: Levels, style: Style) -> Graph:
    """Libra R-CNN's balanced pyramid, Pang et al. 2019, arXiv:1904.02701.

    After another pyramid: all its levels are gathered at P4 (where there is none, at the middle
    one), averaged, refined by one non-local block, and added back to each. The paper's is
    `fpn+bfp`; its authors' code makes P6 before (`inner_levels=1`, `downsample="subsample"`), so
    that it takes part.

    ::

        B   = non_local(mean over l of resize(P_l))
        O_l = P_l + resize(B)
    """
    need_levels("bfp", inputs, 2, style.inner_levels)
    maps = by_level(inputs)
    nodes = add_inner_levels("bfp", maps, style.inner_levels)
    middle = 4 if 4 in maps else list(maps)[len(maps) // 2]
    edges = [_moved(name, level, middle) for level, name in maps.items()]
    nodes.append(node("bfp_refine", middle, edges, "avg", op("non_local")))
    outputs = {level: f"bfp_output{level}" for level in maps}
    nodes += [
        node(outputs[level], level, [maps[level], _moved("bfp_refine", middle, level)], "sum")
        for level in maps
    ]
    return graph_of(inputs, nodes, outputs)


def _moved(name: str, source: int, target: int) -> Edge:
    """To a finer level by repetition, to a coarser one by the maximum of what falls together."""
    if source == target:
        return Edge(name)
    return Edge(name, resample=op("nearest" if source > target else "maxpool_stride"))


@TOPOLOGIES.register("asff")
def asff(inputs: Levels, style: Style) -> Graph:
    """Adaptively spatial feature fusion, Liu et al. 2019, arXiv:1911.09516.

    After another pyramid: every output takes all its levels, resampled to it, weighted at each
    place by weights that are computed from the maps (`asff`), then a block. The paper's is on an
    FPN: `fpn+asff`.

    ::

        O_l = block(Σ_k α_k · resize(P_k)),   α = softmax over k, at each pixel
    """
    need_levels("asff", inputs, 2)
    maps = by_level(inputs)
    outputs = {level: f"asff_output{level}" for level in maps}
    nodes = []
    for level in maps:
        others = [name for other, name in maps.items() if other != level]
        nodes.append(node(outputs[level], level, [maps[level], *others], "asff", style.block))
    return graph_of(inputs, nodes, outputs)
