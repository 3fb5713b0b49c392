"""Convert a checkpoint to another pyramid, or to Detectron2's FPN.

It does what MODEL.FPN.WARM_START does when training starts.

fpn convert --config-file FILE --weights model.pth --output folder/new.pth [KEY VALUE …]
    for that config's pyramid; the config.yaml that the file goes with is written beside it
fpn convert --to detectron2 --weights model.pth --output d2.pth
    a plain fpn of ours for Detectron2's own FPN

What the checkpoint's pyramid is follows from the config.yaml beside it, or from its names.
"""

from __future__ import annotations

import argparse
from typing import Sequence

from detectron2.utils.logger import setup_logger

from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, parse
from fpn_plugin.config import load_config
from fpn_plugin.config.files import find_config_file
from fpn_plugin.engine.setup import argument_parser
from fpn_plugin.engine.warm.convert import check_output, to_config, to_detectron2
from fpn_plugin.modeling.python_config import is_python_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("convert", __doc__)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="the config of the new pyramid")
    add("--weights", required=True, metavar="FILE", help="the checkpoint")
    add("--output", required=True, metavar="FILE", help="the file to write")
    add("--to", choices=("config", "detectron2"), default="config", help="default: config")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("opts", nargs="*", metavar="KEY VALUE", help=OVERRIDES_HELP)
    args = parse(parser, argv)
    if (args.to == "config") != bool(args.config_file):
        parser.error("give --config-file, or --to detectron2")
    if args.opts and args.to == "detectron2":
        parser.error(f"--to detectron2 takes no config overrides, but got {' '.join(args.opts)}")
    return args


def run(args: argparse.Namespace) -> None:
    setup_logger(name="fpn_plugin")
    check_output(args.output, args.weights, args.to == "config", args.overwrite)
    if args.to == "detectron2":
        to_detectron2(args.weights, args.output)
        return
    if is_python_config(find_config_file(args.config_file)):
        raise ValueError(
            f"--config-file {args.config_file}: fpn convert writes for YAML configs; in a Python"
            " config give the new pyramid warm_from=L(PyramidBackbone)(…), the old one, and train"
            f" from train.init_checkpoint={args.weights}"
        )
    forced = ["MODEL.FPN.WARM_START", "True", "MODEL.WEIGHTS", args.weights]
    forced += ["MODEL.BOTTOM_UP.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    command = ["--config-file", args.config_file, *args.opts, *forced]
    to_config(load_config(argument_parser().parse_args(command)), args.output)
