"""Print what a config's pyramid resolves to, with the cost of every node, and draw it.

fpn show --config-file FILE [--draw pyramid.svg] [--size H W] [--weights model.pth] [KEY VALUE …]

With --weights it also prints what every fusion of that checkpoint multiplies its inputs by, and
writes it on the drawn arrows. Nothing but the backbone is built, on the CPU.
"""

from __future__ import annotations

import argparse
from typing import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY

from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, parse
from fpn_plugin.config.heads import head_features
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.modeling.described import load_model_config
from fpn_plugin.modeling.python_config import attached, build_backbone
from fpn_plugin.registry import HOW_TO_ADD, unknown_name
from fpn_plugin.visualize import complexity, draw, fusion_weights

SIZE_HELP = "the image that GFLOPs are counted for, in pixels (default: 800 1344)"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("show", __doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="a config with a pyramid")
    add("--draw", default="", metavar="FILE", help="also draw the graph, as .png or .svg")
    add("--size", nargs=2, type=int, default=(800, 1344), metavar=("H", "W"), help=SIZE_HELP)
    add("--weights", default="", metavar="FILE", help="a checkpoint: also print its fusion weights")
    add("opts", nargs="*", metavar="KEY VALUE", help=OVERRIDES_HELP)
    return parse(parser, argv)


def build(cfg: CfgNode) -> PyramidBackbone:
    """The backbone, on the CPU and without weights."""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    name = cfg.MODEL.BACKBONE.NAME
    if attached(cfg) is None and name not in BACKBONE_REGISTRY:
        known = [builder for builder, _ in BACKBONE_REGISTRY]
        raise unknown_name("MODEL.BACKBONE.NAME", name, known, advice=HOW_TO_ADD)
    backbone = build_backbone(cfg)
    if not isinstance(backbone, PyramidBackbone):
        if attached(cfg) is not None:
            raise ValueError(
                f"model.backbone: a {name} is no pyramid of this plugin: call"
                " fpn_plugin.put_pyramid(model, topology=…) in the config"
            )
        raise ValueError(f"MODEL.BACKBONE.NAME: {name!r} is no pyramid; use build_pyramid_backbone")
    return backbone


def run(args: argparse.Namespace) -> None:
    if args.draw:
        draw.check_extension(args.draw)
    cfg = load_model_config(args.config_file, args.opts)
    backbone = build(cfg)
    if args.weights:
        fusion_weights.load_backbone(backbone, args.weights)
    names = complexity.pyramid_names(cfg)
    costs = complexity.measure(backbone, tuple(args.size))
    print(complexity.settings_text(backbone, names), "", sep="\n")
    print(complexity.node_table(backbone, costs), "", sep="\n")
    print(complexity.totals_text(costs, head_features(cfg)))
    if args.weights:
        table = fusion_weights.fusion_table(backbone)
        print(f"\nfusion weights of {args.weights}", "", table, sep="\n")
    if args.draw:
        weights = fusion_weights.fusion_weights(backbone) if args.weights else {}
        draw.draw_graph(backbone, args.draw, weights=weights)
        print(f"\nthe graph is drawn in {args.draw}")
