"""Print what a config's pyramid resolves to, with the cost of every node, and draw it.

fpn show --config-file FILE [--draw pyramid.svg] [--size H W] [--weights model.pth] [KEY VALUE …]
fpn show --config-file FILE --all [--latency]      the whole catalogue on its network

With --weights it also prints what every fusion of that checkpoint multiplies its inputs by, and
writes it on the drawn arrows. Nothing but the backbone is built, on the CPU.
"""

from __future__ import annotations

import argparse
from typing import Sequence

import torch
from detectron2.config import CfgNode

from fpn_plugin.benchmark.catalogue import (
    REFERENCE,
    catalogue,
    catalogue_table,
    count_costs,
    measure_latencies,
    preset_files,
    with_preset,
)
from fpn_plugin.benchmark.options import SPREAD
from fpn_plugin.benchmark.timing import Plan
from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, parse
from fpn_plugin.config.defaults import PYRAMID_BUILDER
from fpn_plugin.config.heads import head_features
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.modeling.described import load_model_config
from fpn_plugin.modeling.python_config import attached, build_backbone
from fpn_plugin.report.environment import collect_environment, environment_warnings
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize import complexity, draw, fusion_weights
from fpn_plugin.visualize.complexity import padded_size

SIZE_HELP = "the image that GFLOPs are counted for, in pixels (default: 800 1344)"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("show", __doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="a config with a pyramid")
    add("--draw", default="", metavar="FILE", help="also draw the graph, as .png or .svg")
    add("--size", nargs=2, type=int, default=(800, 1344), metavar=("H", "W"), help=SIZE_HELP)
    add("--weights", default="", metavar="FILE", help="a checkpoint: also print its fusion weights")
    text = "the costs of every pyramid of configs/pyramids in the place of the config's"
    add("--all", action="store_true", help=text)
    text = "with --all: also time them, in turns, on the CPU"
    add("--latency", action="store_true", help=text)
    text = "with --latency: at least; up to four times as many where times spread (default: 5)"
    add("--rounds", type=int, default=5, metavar="N", help=text)
    add("opts", nargs="*", metavar="KEY VALUE", help=OVERRIDES_HELP)
    args = parse(parser, argv)
    if args.all and (args.draw or args.weights):
        parser.error("--all: it goes with --size and --latency, not with --draw or --weights")
    if args.latency and not args.all:
        parser.error("--latency: it goes with --all (`fpn benchmark` times one config)")
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is not a number of 1 or more")
    return args


def build(cfg: CfgNode) -> PyramidBackbone:
    """The backbone, on the CPU and without weights."""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    name = cfg.MODEL.BACKBONE.NAME
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
    if args.all:
        show_all(cfg, args)
        return
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


def show_all(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Print what every pyramid of the catalogue costs on a config's network."""
    size, bar = tuple(args.size), Bar()
    presets = preset_files()
    if cfg.MODEL.BACKBONE.NAME != PYRAMID_BUILDER:
        cfg = with_preset(cfg, presets[REFERENCE])
    backbone = build(cfg)
    padded_size(backbone, size)  # an error for a bad size
    network = backbone.bottom_up
    entries = catalogue(cfg, network.output_shape(), size, network.size_divisibility)
    bar.begin("counting", len(entries))
    costs = count_costs(entries, bar.step)
    latencies = {}
    if args.latency:
        bar.begin("timing, rounds", args.rounds)
        plan = Plan(args.rounds, 4 * args.rounds, warm_up=1, max_spread=SPREAD["cpu"])
        latencies = measure_latencies(entries, plan, bar.step)
    bar.end()
    table = catalogue_table(entries, costs, latencies, size)
    print(f"on {cfg.MODEL.BOTTOM_UP.NAME}, {cfg.MODEL.FPN.OUT_CHANNELS} channels\n")
    print(table.text(), table.note, sep="\n\n")
    if args.latency:
        environment = collect_environment("cpu")
        print(f"{environment['cpu']}, {environment['threads']} threads, torch {torch.__version__}")
        for text in environment_warnings(environment)[:1]:
            print(f"WARNING {text}")
