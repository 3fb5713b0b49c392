"""Searched and grid-shaped pyramids: NAS-FPN and Feature Pyramid Grids."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Edge,
    Graph,
    Levels,
    Maps,
    Style,
    add_inner_levels,
    bad_argument,
    graph_of,
    laterals,
    need_levels,
    node,
    op,
    prescribe,
)

# the merging cells of the best architecture: level (0 is the finest), operation, the two inputs;
# inputs and cells are numbered together
_NAS_CELLS = (
    (1, "gp", 1, 3),
    (1, "sum", 1, 5),
    (0, "sum", 0, 6),
    (1, "sum", 6, 7),
    (2, "gp", 7, 8),
    (4, "gp", 6, 9),
    (3, "gp", 9, 10),
)
_PATHWAYS = 9

INNER_LEVELS["nas_fpn"] = INNER_LEVELS["fpg"] = 5


@TOPOLOGIES.register("nas_fpn")
def nas_fpn(inputs: Levels, style: Style) -> Graph:
    """NAS-FPN, Ghiasi et al. 2019, arXiv:1904.07392.

    Seven merging cells on five levels, found by architecture search; this is one of its (seven)
    repeats. A level's output is its last cell, and every node of that level that nothing read joins
    its fusion.

    ::

        cell(a, b) = norm(block(ReLU(op(resize(a), resize(b)))))
        op         = fuse, or global_attention (gp)
        cells      = (4, gp, P4, P6) (4, fuse, P4, c0) (3, fuse, P3, c1) (4, fuse, c1, c2)
                     (5, gp, c2, c3) (7, gp, c1, c4) (6, gp, c4, c5)

    Raises:
        ValueError: if there are not five levels.
    """
    if len(inputs) + style.inner_levels != 5:
        raise bad_argument(
            "topology",
            f"'nas_fpn' was searched for five levels, but gets {len(inputs)} from `in_features`"
            f" {list(inputs)} and {style.inner_levels} of its own (`inner_levels`)",
        )
    nodes, maps = laterals("nas_fpn", inputs, style)
    nodes += add_inner_levels("nas_fpn", maps, style.inner_levels, op("maxpool_stride"))
    levels = sorted(maps)
    block = prescribe(style.block, order="act-conv-norm", activation=style.act("relu"), bias=True)
    merged = [(level, maps[level]) for level in levels]  # level and node by id
    unread = set(range(len(levels)))
    outputs: Maps = {}
    for index, (row, operation, *sources) in enumerate(_NAS_CELLS):
        level, name = levels[row], f"nas_fpn_cell{index}"
        unread -= set(sources)
        edges = [_nas_edge(merged[source], level) for source in sources]
        last = not any(cell[0] == row for cell in _NAS_CELLS[index + 1 :])
        rest = [Edge(merged[i][1]) for i in sorted(unread) if last and merged[i][0] == level]
        fuse = "global_attention" if operation == "gp" else None
        if fuse and rest:
            nodes.append(node(f"{name}_attention", level, edges, fuse))
            edges, fuse = [Edge(nodes[-1].name)], None
        nodes.append(node(name, level, edges + rest, fuse, block))
        unread.add(len(merged))
        merged.append((level, name))
        outputs[level] = name
    return graph_of(inputs, nodes, outputs)


def _nas_edge(source: tuple[int, str], level: int) -> Edge:
    return Edge(source[1], resample=op("maxpool_stride") if source[0] < level else None)


@TOPOLOGIES.register("fpg")
def fpg(inputs: Levels, style: Style) -> Graph:
    """Feature Pyramid Grids, Chen et al. 2020, arXiv:2004.03580.

    Nine bottom-up pathways side by side: each node sums what comes from the finer level of its
    pathway, from its own and the coarser level of the pathway before, and from its level's lateral.
    All convolutions are act-conv-norm. Early nodes of fine levels are left out and pass the pathway
    before on; the outputs are blocks on the last pathway.

    ::

        N_{p,l} = 3x3 s2(N_{p,l-1}) + 1x1(N_{p-1,l}) + 3x3(up(N_{p-1,l+1})) + 1x1(lateral_l)
        P_l     = block(N_{9,l})
    """
    need_levels("fpg", inputs, 2, style.inner_levels)
    nodes, maps = laterals("fpg", inputs, style)
    nodes += add_inner_levels("fpg", maps, style.inner_levels)
    levels = sorted(maps)
    pre = {"order": "act-conv-norm", "activation": style.act("relu")}
    conv1x1, conv3x3, down = op("conv1x1", **pre), op("conv3x3", **pre), op("conv", **pre)
    first, before = dict(maps), dict(maps)
    for pathway in range(_PATHWAYS):
        now = dict(before)
        for index, level in enumerate(levels):
            if pathway < len(levels) - 1 - index:
                continue
            edges = [Edge(before[level], block=conv1x1)]
            if index:
                edges.append(Edge(now[levels[index - 1]], resample=down))
            if level != levels[-1]:
                edges.append(Edge(before[levels[index + 1]], block=conv3x3))
            edges.append(Edge(first[level], block=conv1x1))
            now[level] = f"fpg_p{pathway}_{level}"
            nodes.append(node(now[level], level, edges, "sum"))
        before = now
    outputs = {level: f"fpg_output{level}" for level in levels}
    block = style.pre_activated("relu")
    nodes += [node(outputs[level], level, [before[level]], block=block) for level in levels]
    return graph_of(inputs, nodes, outputs)
