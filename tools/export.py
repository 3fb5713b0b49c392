#!/usr/bin/env python3
"""Export a trained model to a file that runs without this plugin and without Detectron2: its
bottom-up network and pyramid (--what backbone), or the whole detector.

export.py --config-file F --weights W --format onnx --output output/fpn.onnx
export.py --config-file F --weights W --format torch_export --output output/fpn.pt2
export.py --config-file F --weights W --what detector --format torchscript --output output/m.ts \\
    --input photo.jpg

Before it says that it is done, the file is run on three sizes and compared with the model. What the
pixels must be is in a JSON beside the file; docs/examples/run_exported.py runs both.
"""

import os

# before torch is imported: its OpenMP workers otherwise spin and starve a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import fpn_plugin  # noqa: E402, F401  (registers the builders and the datasets)
from fpn_plugin.checkpoint.fit import PARTIAL_HELP  # noqa: E402
from fpn_plugin.export.export import Settings, export  # noqa: E402
from fpn_plugin.export.formats import FORMATS  # noqa: E402
from fpn_plugin.export.model import WHAT  # noqa: E402
from fpn_plugin.report.progress import Bar  # noqa: E402


def parse_args() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="of the model")
    add("--weights", default="", metavar="FILE", help="a checkpoint (default: MODEL.WEIGHTS)")
    add("--format", required=True, choices=list(FORMATS))
    add("--output", required=True, type=Path, metavar="FILE", help="ends in .ts, .pt2 or .onnx")
    add("--what", choices=WHAT, default="backbone", help="with its pyramid; default: backbone")
    add("--sizes", default="", metavar="HxW,HxW", help="to compare on (default: three)")
    add("--fixed-size", default="", metavar="HxW", help="the file takes this size only")
    add("--batch", type=int, default=0, help="the only one of the file; 0: any (default)")
    text = "photos to compare on, for a detector that finds nothing in random images"
    add("--input", nargs="+", default=(), type=Path, metavar="FILE", dest="inputs", help=text)
    add("--time-limit", type=int, default=900, metavar="S", help="seconds (default: 900); 0: none")
    add("--overwrite", action="store_true", help="replace a file that is there")
    add("--allow-partial", action="store_true", help=PARTIAL_HELP.replace("evaluate", "export"))
    add("--quiet", action="store_true", help="no progress; only the differences and the file")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    # intermixed: overrides may stand after other arguments
    return parser.parse_intermixed_args()


def main() -> None:
    args = vars(parse_args())
    quiet = args.pop("quiet")
    warnings.simplefilter("ignore")
    if quiet:
        logging.disable(logging.INFO)
    for difference in export(Settings(**args), Bar(quiet)):
        print(difference)
    print(args["output"])


if __name__ == "__main__":
    sys.exit(main())
