"""Run a trained detector on photos, videos or a camera: pictures with class names and scores.

fpn predict --weights model.pth --input photo.jpg folder/ 'more/*.png' video.mp4
fpn predict --weights model.pth --input folder/ --json --score 0.3 --output DIR
fpn predict --weights model.pth --input camera           camera:1 is the second one; ctrl-C ends it
fpn predict --weights model.pth --dataset trees_val --json-only --output DIR

The config is that of the run that wrote the weights: the checkpoint has it, or config.yaml beside
it. The detections are those of an evaluation, with the precision and the options for speed of the
config. Images that cannot be read are left out, and named at the end; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Sequence

from fpn_plugin.checkpoint.fit import PARTIAL_HELP
from fpn_plugin.cli.arguments import command_parser, own_arguments
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import CONFIG_HELP
from fpn_plugin.visualize.predict import RESULTS, Settings, predict


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("predict", __doc__)
    add = parser.add_argument
    add("--weights", default="", metavar="FILE", help="a checkpoint (default: MODEL.WEIGHTS)")
    add("--config-file", default="", metavar="FILE", help=CONFIG_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "images, videos, folders, patterns, or camera"
    source.add_argument("--input", nargs="+", default=(), dest="inputs", help=text)
    text = "all images of a registered dataset"
    source.add_argument("--dataset", default="", metavar="NAME", help=text)
    text = "where the files go (default: predictions)"
    add("--output", type=Path, default=Path("predictions"), metavar="DIR", help=text)
    text = "detections below it are not drawn (default: 0.5)"
    add("--score", type=float, default=0.5, help=text)
    text = f"also write DIR/{RESULTS}, COCO's result format: all detections, whatever --score"
    add("--json", action="store_true", help=text)
    add("--json-only", action="store_true", help="write that file and no pictures")
    add("--overwrite", action="store_true", help="replace files of an earlier call")
    add("--allow-partial", action="store_true", help=PARTIAL_HELP.replace("evaluate", "predict"))
    add("--quiet", action="store_true", help="no progress; the files' names alone are printed")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    # intermixed: overrides may stand after other arguments
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    settings = own_arguments(args)
    quiet = settings.pop("quiet")
    if quiet:
        logging.disable(logging.INFO)
        warnings.simplefilter("ignore")
    return predict(Settings(**settings), Bar(quiet), print)
