"""The pyramids from maps of one level, as a plain ViT's blocks give: LW-DETR's projector, and the
levels of BEiT's segmenter."""

from __future__ import annotations

from fpn_plugin.pyramid.topologies.base import (
    TOPOLOGIES,
    Edge,
    Graph,
    Levels,
    Maps,
    Node,
    Style,
    bad_argument,
    graph_of,
    node,
    op,
    the_level,
)


@TOPOLOGIES.register("projector")
def projector(inputs: Levels, style: Style) -> Graph:
    """Multi-scale projector of LW-DETR, Chen et al. 2024, arXiv:2406.03459 (also RF-DETR's,
    arXiv:2511.09554).

    It reads one or more maps of one level: a plain ViT's after several of its blocks
    (`in_features: [res4_3, res4_6, res4_9, res4]`). For each of three levels, one finer, their own
    and one coarser, every map is resampled in its own width, and one block mixes them all. The
    papers' transposed and strided convolutions and their block are in configs/pyramids. The width
    of `P_l` is normalised over the channels, whatever the pyramid's norm.

    ::

        M_l = block(stack(resize(V_1), …, resize(V_k)))   (V: the ViT's maps)
        P_l = LN(M_l)

    Raises:
        ValueError: if the inputs are of several levels, or too fine.
    """
    middle = the_level("projector", inputs, finer=1)
    edges = [Edge(name, project=op("identity")) for name in inputs]
    nodes: list[Node] = []
    outputs: Maps = {}
    for level in (middle - 1, middle, middle + 1):
        outputs[level] = f"projector_output{level}"
        mixed = f"projector_mix{level}"
        nodes.append(node(mixed, level, edges, "stack", style.block))
        nodes.append(
            node(outputs[level], level, [mixed], block=op("norm", norm="LN", activation=""))
        )
    return graph_of(inputs, nodes, outputs)


@TOPOLOGIES.register("feature2pyramid")
def feature2pyramid(inputs: Levels, style: Style) -> Graph:
    """The levels of BEiT's and DINOv2's segmenters (UperNet), Bao et al. 2021, arXiv:2106.08254.

    It reads four maps of one level, a plain ViT's after four of its blocks, and makes a level of
    each, without mixing: the first map becomes the finest level. A single map becomes all four. An
    FPN after it lets them meet: `feature2pyramid+fpn`. Unlike in `simple`, the transposed
    convolutions keep the channels.

    ::

        P_2 = lateral(deconv(GELU(norm(deconv(V_1)))))   (V: the ViT's maps, of level 4)
        P_3 = lateral(deconv(V_2))
        P_4 = lateral(V_3)
        P_5 = lateral(maxpool(V_4))

    Raises:
        ValueError: if there are not one or four inputs, of one level, or they are too fine.
    """
    middle = the_level("feature2pyramid", inputs, finer=2)
    if len(inputs) not in (1, 4):
        raise bad_argument(
            "topology",
            "'feature2pyramid' makes four levels from four maps, or from one, but `in_features`"
            f" names {len(inputs)}: {list(inputs)}",
        )
    up, down = op("deconv", activation=style.act("gelu")), op("maxpool_stride")
    sources = list(inputs) * (4 // len(inputs))
    nodes = [
        node(
            f"feature2pyramid_output{level}",
            level,
            [
                Edge(
                    name, op("identity"), down if level > middle else up if level < middle else None
                )
            ],
            block=style.lateral,
        )
        for level, name in enumerate(sources, start=middle - 2)
    ]
    return graph_of(inputs, nodes, {each.level: each.name for each in nodes})
