"""Export a trained model to TorchScript, torch.export, ONNX or OpenVINO.

The file has its bottom-up network and pyramid (--what backbone), or the whole detector, and runs
without this plugin and without Detectron2.

fpn export --weights W --format onnx --output output/fpn.onnx
fpn export --weights W --format torch_export --output output/fpn.pt2
fpn export --weights W --what detector --format torchscript --output output/m.ts \\
    --input photo.jpg
fpn export --weights W --what detector --format openvino --precision int8 \\
    --calibrate trees_train --evaluate trees_val --output output/m.xml

Before it says that it is done, the file is run on three sizes and compared with the model, and with
--evaluate refused where its AP is lower than the model's by more than --max-drop. What the
pixels must be is in a JSON beside the file; docs/examples/run_exported.py runs both.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Sequence

from fpn_plugin.checkpoint.fit import PARTIAL_HELP
from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, own_arguments, parse
from fpn_plugin.export.export import Settings, export
from fpn_plugin.export.formats import FORMATS
from fpn_plugin.export.model import WHAT
from fpn_plugin.export.openvino_ir import PRECISIONS
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import CONFIG_HELP


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=CONFIG_HELP)
    add("--weights", default="", metavar="FILE", help="a checkpoint (default: MODEL.WEIGHTS)")
    add("--format", required=True, choices=list(FORMATS))
    add("--output", required=True, type=Path, metavar="FILE", help="in .ts, .pt2, .onnx or .xml")
    add("--what", choices=WHAT, default="backbone", help="with its pyramid; default: backbone")
    add("--sizes", default="", metavar="HxW,HxW", help="to compare on (default: three)")
    add("--fixed-size", default="", metavar="HxW", help="the file takes this size only")
    add("--batch", type=int, default=0, help="the only one of the file; 0: any (default)")
    text = "photos to compare on, for a detector that finds nothing in random images"
    add("--input", nargs="+", default=(), type=Path, metavar="FILE", dest="inputs", help=text)
    add("--opset", type=int, default=0, help="of ONNX (default: 20, of a detector 17)")
    text = "of OpenVINO (default: float32); int8 is quantised by NNCF"
    add("--precision", choices=PRECISIONS, default="float32", help=text)
    text = "training images that int8 is calibrated on: datasets, files, folders, patterns"
    add("--calibrate", nargs="+", default=(), metavar="IMAGES", help=text)
    text = "at most so many of them (default: 128)"
    add("--calibrate-num", type=int, default=128, metavar="N", help=text)
    text = "print AP of the model and of the file on a dataset, which may be own_val"
    add("--evaluate", default="", metavar="DATASET", help=text)
    text = "with --evaluate: refuse a file whose AP is lower by more (default: 0.5)"
    add("--max-drop", type=float, default=0.5, metavar="AP", help=text)
    text = "of int8: leave parts as they are until AP on --evaluate is within --max-drop"
    add("--accuracy-aware", action="store_true", help=text)
    add("--time-limit", type=int, default=900, metavar="S", help="seconds (default: 900); 0: none")
    add("--overwrite", action="store_true", help="replace a file that is there")
    add("--allow-partial", action="store_true", help=PARTIAL_HELP.replace("evaluate", "export"))
    add("--quiet", action="store_true", help="no progress; only the differences and the file")
    add("opts", nargs="*", metavar="KEY VALUE", help=OVERRIDES_HELP)
    return parse(parser, argv)


def run(args: argparse.Namespace) -> None:
    settings = own_arguments(args)
    quiet = settings.pop("quiet")
    warnings.simplefilter("ignore")
    if quiet:
        logging.disable(logging.INFO)
    for difference in export(Settings(**settings), Bar(quiet), print):
        print(difference)
    print(args.output)
