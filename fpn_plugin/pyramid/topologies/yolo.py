"""The pyramids of YOLO's family: paths down and up again whose nodes run a whole stage on what is
concatenated.

Their fusion is `stack` in the papers, with what is resampled first, and the block of a node one of
`csp`, `c2f`, `csp_stage` and `rep_stage`. Both are the user's, as are the resamplers: configs have
the published ones in `pyramids/`.
"""

from __future__ import annotations

from typing import Any

from fpn_plugin.pyramid.topologies.base import (
    TOPOLOGIES,
    Edge,
    Graph,
    Levels,
    Maps,
    Node,
    Operator,
    Style,
    bad_argument,
    by_level,
    graph_of,
    laterals,
    need_levels,
    node,
    op,
    prescribe,
)


def _stage(style: Style, activation: str) -> Operator:
    """The block of a node. Units in YOLO's pyramids have no shortcut."""
    return prescribe(style.block, activation=style.act(activation), shortcut=False)


def _conv1x1(style: Style, activation: str) -> Operator:
    return op("conv1x1", activation=style.act(activation))


def _top_down(prefix: str, maps: Maps, block: Operator, **edge: Any) -> tuple[list[Node], Maps]:
    """`T_l = block(fuse(up(T_{l+1}), X_l))`.

    Args:
        edge: of what is upsampled.
    """
    levels = sorted(maps)
    nodes: list[Node] = []
    middle = {levels[-1]: maps[levels[-1]]}
    for level, above in reversed(list(zip(levels, levels[1:]))):
        middle[level] = f"{prefix}_td{level}"
        sources: list[str | Edge] = [Edge(middle[above], **edge), maps[level]]
        nodes.append(node(middle[level], level, sources, block=block))
    return nodes, middle


def reduced_top_down(
    prefix: str, maps: Maps, block: Operator, reduce: Operator
) -> tuple[list[Node], Maps]:
    """`T_l = block(fuse(up(R_{l+1}), X_l))` with `R_l = reduce(T_l)`, and R in the place of T but
    at the finest level."""
    levels = sorted(maps)
    middle = {levels[-1]: f"{prefix}_reduce{levels[-1]}"}
    nodes = [node(middle[levels[-1]], levels[-1], [maps[levels[-1]]], block=reduce)]
    for level, above in reversed(list(zip(levels, levels[1:]))):
        middle[level] = f"{prefix}_td{level}"
        nodes.append(node(middle[level], level, [middle[above], maps[level]], block=block))
        if level != levels[0]:
            name, middle[level] = middle[level], f"{prefix}_reduce{level}"
            nodes.append(node(middle[level], level, [name], block=reduce))
    return nodes, middle


def bottom_up(prefix: str, maps: Maps, block: Operator) -> tuple[list[Node], Maps]:
    """`O_min = X_min`, `O_l = block(fuse(down(O_{l-1}), X_l))`."""
    levels = sorted(maps)
    nodes: list[Node] = []
    outputs = {levels[0]: maps[levels[0]]}
    for below, level in zip(levels, levels[1:]):
        outputs[level] = f"{prefix}_bu{level}"
        nodes.append(node(outputs[level], level, [outputs[below], maps[level]], block=block))
    return nodes, outputs


def _outputs(prefix: str, maps: Maps, block: Operator) -> tuple[list[Node], Maps]:
    nodes = [
        node(f"{prefix}_output{level}", level, [name], block=block) for level, name in maps.items()
    ]
    return nodes, {each.level: each.name for each in nodes}


def _yolox(name: str, inputs: Levels, style: Style, output: Operator) -> Graph:
    need_levels(name, inputs, 2)
    block, reduce = _stage(style, "silu"), _conv1x1(style, "silu")
    nodes, maps = laterals(name, inputs, style, activation="")
    down, middle = reduced_top_down(name, maps, block, reduce)
    up, merged = bottom_up(name, middle, block)
    ends, outputs = _outputs(name, merged, output)
    return graph_of(inputs, [*nodes, *down, *up, *ends], outputs)


@TOPOLOGIES.register("csp_pan")
def csp_pan(inputs: Levels, style: Style) -> Graph:
    """YOLOX's pyramid, Ge et al. 2021, arXiv:2107.08430.

    PANet's two paths with a whole CSP stage per node, on what is concatenated instead of added. The
    coarser map is reduced by a 1x1 before it goes up, and the bottom-up path reads the reduced one.

    ::

        X_l   = lateral(C_l)
        R_l   = SiLU(1x1(T_l)),  T_top = X_top
        T_l   = block(fuse(up(R_{l+1}), X_l))
        O_min = T_min,  O_l = block(fuse(down(O_{l-1}), R_l))
        P_l   = SiLU(1x1(O_l))
    """
    return _yolox("csp_pan", inputs, style, _conv1x1(style, "silu"))


@TOPOLOGIES.register("csp_pan_rtmdet")
def csp_pan_rtmdet(inputs: Levels, style: Style) -> Graph:
    """RTMDet's pyramid, Lyu et al. 2022, arXiv:2212.07784.

    YOLOX's (`csp_pan`) with 3x3 output convolutions. Its blocks have large depthwise kernels.

    ::

        O_l = csp_pan's
        P_l = SiLU(3x3(O_l))
    """
    output = op("conv3x3", activation=style.act("silu"))
    return _yolox("csp_pan_rtmdet", inputs, style, output)


@TOPOLOGIES.register("csp_pan_yolov8")
def csp_pan_yolov8(inputs: Levels, style: Style) -> Graph:
    """YOLOv8's pyramid, which later YOLOs keep.

    The paths of `csp_pan` without the 1x1 between nodes, and without output convolutions: nodes
    only.

    ::

        T_top = X_top = lateral(C_top)
        T_l   = block(fuse(up(T_{l+1}), lateral(C_l)))
        P_min = T_min,  P_l = block(fuse(down(P_{l-1}), T_l))
    """
    name = "csp_pan_yolov8"
    need_levels(name, inputs, 2)
    block = _stage(style, "silu")
    nodes, maps = laterals(name, inputs, style, activation="")
    down, middle = _top_down(name, maps, block)
    up, outputs = bottom_up(name, middle, block)
    return graph_of(inputs, [*nodes, *down, *up], outputs)


@TOPOLOGIES.register("csp_pan_ppyoloe")
def csp_pan_ppyoloe(inputs: Levels, style: Style) -> Graph:
    """PP-YOLOE's pyramid, Xu et al. 2022, arXiv:2203.16250.

    The coarsest map has a block of its own. A 1x1 reduces what goes up, while the bottom-up path
    reads the maps before it.

    ::

        T_top = block(lateral(C_top))
        T_l   = block(fuse(up(SiLU(1x1(T_{l+1}))), lateral(C_l)))
        P_min = T_min,  P_l = block(fuse(down(P_{l-1}), T_l))
    """
    name = "csp_pan_ppyoloe"
    need_levels(name, inputs, 2)
    block = _stage(style, "silu")
    nodes, maps = laterals(name, inputs, style, activation="")
    top = max(maps)
    nodes.append(node(f"{name}_td{top}", top, [maps[top]], block=block))
    maps[top] = nodes[-1].name
    down, middle = _top_down(name, maps, block, project=_conv1x1(style, "silu"))
    up, outputs = bottom_up(name, middle, block)
    return graph_of(inputs, [*nodes, *down, *up], outputs)


@TOPOLOGIES.register("repgfpn")
def repgfpn(inputs: Levels, style: Style) -> Graph:
    """DAMO-YOLO's efficient RepGFPN, Xu et al. 2022, arXiv:2211.15444.

    Coarse maps first: the bottom-up maps are merged from the coarsest down, each with the finer one
    as well, and then in a bottom-up path that skips back to them. It is as its authors' code has
    it, five nodes on three levels, where the paper's figure has six.

    ::

        A_top = block(fuse(X_top, down(X_{top-1}))),  X_l = lateral(C_l)
        A_l   = block(fuse(X_l, down(X_{l-1}), up(A_{l+1})))
        P_min = block(fuse(X_min, up(A_{min+1})))
        P_l   = block(fuse(A_l, down(P_{l-1})))                  (l = min + 1)
        P_l   = block(fuse(A_l, down(A_{l-1}), down(P_{l-1})))
    """
    name = "repgfpn"
    need_levels(name, inputs, 2)
    # its units do have a shortcut
    block = prescribe(style.block, activation=style.act("relu"))
    nodes, maps = laterals(name, inputs, style, activation="")
    levels = sorted(maps)
    steps = list(zip(levels, levels[1:]))
    merged: Maps = {}
    above: list[str] = []
    for below, level in reversed(steps):
        merged[level] = f"{name}_merge{level}"
        nodes.append(node(merged[level], level, [maps[level], maps[below], *above], block=block))
        above = [merged[level]]
    outputs = {levels[0]: f"{name}_output{levels[0]}"}
    nodes.append(node(outputs[levels[0]], levels[0], [maps[levels[0]], *above], block=block))
    for below, level in steps:
        skipped = [merged[below]] if below in merged else []
        sources = [merged[level], *skipped, outputs[below]]
        outputs[level] = f"{name}_output{level}"
        nodes.append(node(outputs[level], level, sources, block=block))
    return graph_of(inputs, nodes, outputs)


@TOPOLOGIES.register("bifusion")
def bifusion(inputs: Levels, style: Style) -> Graph:
    """YOLOv6's RepBi-PAN, Li et al. 2023, arXiv:2301.05586.

    Each top-down node also sees the bottom-up map that is one level finer, so that it knows where
    objects are. Hence the finest bottom-up map gives no output of its own.

    ::

        R_top = ReLU(1x1(C_top)),  R_l = ReLU(1x1(T_l))
        F_l   = ReLU(1x1(fuse(up(R_{l+1}), ReLU(1x1(C_l)), down(ReLU(1x1(C_{l-1}))))))
        T_l   = block(F_l)
        P_min = T_min,  P_l = block(fuse(down(P_{l-1}), R_l))    (min: the second finest level)

    Raises:
        ValueError: if there are fewer than three levels.
    """
    name = "bifusion"
    if len(inputs) < 3:
        raise bad_argument(
            "topology",
            f"{name!r} needs at least 3 levels, of which the finest gives no output, but gets"
            f" {len(inputs)} from `in_features` {list(inputs)}",
        )
    block, reduce = _stage(style, "relu"), _conv1x1(style, "relu")
    maps = by_level(inputs)
    lateral = prescribe(style.lateral, activation=style.act("relu"))
    levels = sorted(maps)
    top = levels[-1]
    middle = {top: f"{name}_reduce{top}"}
    nodes = [node(middle[top], top, [maps[top]], block=lateral)]
    for below, level, above in reversed(list(zip(levels, levels[1:], levels[2:]))):
        read = [Edge(maps[each], project=lateral) for each in (level, below)]
        sources: list[str | Edge] = [middle[above], *read]
        merged, middle[level] = f"{name}_merge{level}", f"{name}_td{level}"
        nodes.append(node(merged, level, sources, block=reduce))
        nodes.append(node(middle[level], level, [merged], block=block))
        if level != levels[1]:
            source, middle[level] = middle[level], f"{name}_reduce{level}"
            nodes.append(node(middle[level], level, [source], block=reduce))
    up, outputs = bottom_up(name, middle, block)
    return graph_of(inputs, [*nodes, *up], outputs)
