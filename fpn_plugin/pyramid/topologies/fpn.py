"""The top-down pyramids: FPN, the baseline without fusion, FaPN, and ViTDet's simple pyramid."""

from __future__ import annotations

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
    node,
    op,
    prescribe,
    the_level,
)


def top_down(
    inputs: Levels, style: Style, prefix: str = "fpn", up: Operator | None = None
) -> tuple[list[Node], Maps]:
    """FPN's nodes and its outputs by level.

    Args:
        prefix: of the node names.
        up: the resampler of the top-down path. Default: the pyramid's `upsample`.
    """
    nodes: list[Node] = []
    outputs: Maps = {}
    above = ""
    for level, name in reversed(list(by_level(inputs).items())):
        lateral = f"{prefix}_lateral{level}"
        nodes.append(node(lateral, level, [name], block=style.lateral))
        if above:
            nodes.append(node(f"{prefix}_merge{level}", level, [lateral, Edge(above, resample=up)]))
        above = nodes[-1].name
        outputs[level] = f"{prefix}_output{level}"
        nodes.append(node(outputs[level], level, [above], block=style.block))
    return nodes, outputs


@TOPOLOGIES.register("fpn")
def fpn(inputs: Levels, style: Style) -> Graph:
    """Feature Pyramid Network, Lin et al. 2017, arXiv:1612.03144.

    From the coarsest map down, each level adds what comes from above, upsampled, to a 1x1 lateral
    of its own bottom-up map, so that fine maps know what coarse ones have seen. It is Detectron2's:
    the names of the convolutions, the numbers and the checkpoints are the same.

    ::

        M_top = lateral_top
        M_l   = fuse(lateral_l, up(M_{l+1}))
        P_l   = block(M_l)
    """
    return graph_of(inputs, *top_down(inputs, style))


@TOPOLOGIES.register("fapn")
def fapn(inputs: Levels, style: Style) -> Graph:
    """Feature-aligned pyramid, Huang et al. 2021, arXiv:2108.07058.

    FPN with feature selection (`fsm`) as the lateral of each bottom-up map, and feature alignment
    (`fam`) in place of upsampling: a deformable convolution moves what comes from above to where
    the finer map has it. On a CPU these convolutions are by far the most expensive part.

    ::

        M_top = fsm(C_top)
        M_l   = fuse(fsm(C_l), fam(M_{l+1}))
        P_l   = block(M_l)
    """
    selecting = Style(op("fsm"), style.block)
    return graph_of(inputs, *top_down(inputs, selecting, "fapn", op("fam")))


@TOPOLOGIES.register("channel_mapper")
def channel_mapper(inputs: Levels, style: Style) -> Graph:
    """Channel mapper, the baseline without fusion.

    Each bottom-up map is brought to the common width by one block, and nothing passes between
    levels. What another pyramid gains over it is what fusion brings.

    ::

        P_l = block(C_l)
    """
    nodes = [
        node(f"mapper{level}", level, [name], block=style.block)
        for level, name in by_level(inputs).items()
    ]
    return graph_of(inputs, nodes, {each.level: each.name for each in nodes})


@TOPOLOGIES.register("simple")
def simple(inputs: Levels, style: Style) -> Graph:
    """ViTDet's simple pyramid, Li et al. 2022, arXiv:2203.16527.

    All levels are made from one map, of stride 16: x4 and x2 by transposed convolutions that halve
    the channels, x1, and x1/2 by max pooling, each followed by 1x1 and 3x3 with a norm (layer norm
    in the paper: `norm="LN"`). It is for networks without stages, such as a plain ViT.

    ::

        P_2 = block(lateral(deconv(GELU(LN(deconv(C_4))))))
        P_3 = block(lateral(deconv(C_4)))
        P_4 = block(lateral(C_4))
        P_5 = block(lateral(maxpool(C_4)))

    Raises:
        ValueError: if there is not exactly one input, or it is too fine.
    """
    if len(inputs) != 1:
        raise bad_argument(
            "topology",
            f"'simple' reads one map, but `in_features` names {len(inputs)}: {list(inputs)}",
        )
    (name,), level = inputs, the_level("simple", inputs, finer=2)
    up = op("deconv", shrink=True, activation=style.act("gelu"))
    resample = {-2: up, -1: up, 0: None, 1: op("maxpool_stride")}
    nodes = [
        node(
            f"simple_output{level + step}",
            level + step,
            [Edge(name, resample=resample[step], block=prescribe(style.lateral, activation=""))],
            block=style.block,
        )
        for step in resample
    ]
    return graph_of(inputs, nodes, {each.level: each.name for each in nodes})
