"""Draw what a trained detector sees, level by level of its pyramid.

One figure per image: detections and masks by pyramid level, a histogram by size and level, a heat
map of every level at each stage of the pyramid; and its graph, with the fusion weights that it has
learned.

fpn visualize --weights W --input photo.jpg folder/ 'more/*.png' --output DIR --html
fpn visualize --weights W --dataset trees_val --num 4 --output DIR
fpn visualize --weights W --dataset trees_val --num 99 --output DIR --sizes-only
fpn visualize --results R/inference/coco_instances_results.json --dataset trees_val --output DIR

The truth is drawn where it is known: with --dataset, and for an --input that is a file of a dataset
in DATASETS.TEST. Models run uncompiled and in full precision. With --results no model runs: the
truth is drawn beside the detections that an evaluation wrote; --config-file is then only needed for
your own data (own_train, own_val), to say where they are.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Sequence

from fpn_plugin.checkpoint.fit import PARTIAL_HELP
from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, own_arguments, parse
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import CONFIG_HELP
from fpn_plugin.visualize.run import Settings, visualize

SCORE_HELP = "detections below it are not shown (default: 0.5)"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("visualize", __doc__)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=CONFIG_HELP)
    add("--weights", default="", metavar="FILE", help="a checkpoint (default: MODEL.WEIGHTS)")
    source = parser.add_mutually_exclusive_group(required=True)
    text = "images, folders or patterns"
    source.add_argument("--input", nargs="+", default=(), dest="inputs", help=text)
    source.add_argument("--dataset", default="", metavar="NAME", help="a registered dataset")
    text = "an evaluation's coco_instances_results.json on --dataset: draw these detections"
    add("--results", default="", metavar="FILE", help=text)
    add("--num", type=int, default=4, help="images of --dataset, at most (default: 4)")
    add("--output", required=True, type=Path, metavar="DIR", help="where the pictures go")
    add("--html", action="store_true", help="also write one page with all: DIR/index.html")
    text = "no pictures, only which level finds objects of which size: DIR/sizes.md"
    add("--sizes-only", action="store_false", dest="pictures", help=text)
    add("--score", type=float, default=0.5, help=SCORE_HELP)
    add("--overwrite", action="store_true", help="replace pictures of an earlier call")
    add("--allow-partial", action="store_true", help=PARTIAL_HELP)
    add("--quiet", action="store_true", help="no progress; the files' names alone are printed")
    add("opts", nargs="*", metavar="KEY VALUE", help=OVERRIDES_HELP)
    args = parse(parser, argv)
    if args.results and not args.dataset:
        parser.error("--results: give the --dataset that they are of")
    if args.results and (args.weights or args.html or not args.pictures):
        parser.error("--results: no model runs, so leave out --weights, --html and --sizes-only")
    return args


def run(args: argparse.Namespace) -> None:
    settings = own_arguments(args)
    quiet = settings.pop("quiet")
    if quiet:
        logging.disable(logging.INFO)
        warnings.simplefilter("ignore")
    for path in visualize(Settings(**settings), Bar(quiet)):
        print(path)
