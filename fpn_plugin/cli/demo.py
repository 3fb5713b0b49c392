"""Prepare a small dataset, train a detector with a pyramid on it, evaluate it, draw what it finds.

fpn demo trees --output output/demo            boxes of tree crowns in aerial photos
fpn demo scenes --output output/demo-masks     masks of shapes in drawn scenes

It runs `fpn train` on a config of configs/quickstart, as one would by hand, and shows its
progress; the whole log is in OUTPUT/log.txt. A demo that was interrupted goes on where it stopped,
a finished one is run anew, and a folder with the results of any other run is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Sequence

from fpn_plugin import plugins
from fpn_plugin.cli.arguments import command_parser
from fpn_plugin.engine.run_folder import METRICS, claim_demo_dir
from fpn_plugin.engine.setup import load_config
from fpn_plugin.paths import dataset_root
from fpn_plugin.report.progress import ap_table, show_training
from fpn_plugin.visualize.results import draw_results

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "datasets"))

from prepare_scenes import prepare_scenes  # noqa: E402
from prepare_trees import prepare_trees  # noqa: E402
from prepare_weights import prepare_weights  # noqa: E402

CONFIGS = {"trees": "faster_rcnn_trees_FPN", "scenes": "mask_rcnn_scenes_FPN"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("demo", __doc__)
    parser.add_argument("demo", choices=CONFIGS)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    # intermixed: overrides may stand after --output
    return parser.parse_intermixed_args(argv)


def train(name: str, config: Path, flags: list[str], output: Path, opts: list[str]) -> None:
    """Run `fpn train`, and show its progress and warnings."""
    command = [sys.executable, "-m", "fpn_plugin", "train"]
    command += [*plugins.flags(plugins.named()), "--config-file", str(config), *flags]
    command += ["OUTPUT_DIR", str(output), *opts]
    cfg = load_config(argparse.Namespace(config_file=str(config), opts=opts))
    show_training(command, name, cfg.SOLVER.MAX_ITER, output / METRICS)


def run(args: argparse.Namespace) -> None:
    start = time.time()
    flags = claim_demo_dir(str(args.output), args.demo)
    root = dataset_root()
    print(f"Preparing {args.demo} and the ImageNet weights in {root}/", flush=True)
    prepare_weights(root)
    prepare_trees(root) if args.demo == "trees" else prepare_scenes(root)
    config = ROOT / "configs" / "quickstart" / f"{CONFIGS[args.demo]}.yaml"
    print(f"Training {config.relative_to(ROOT)}", *flags, flush=True)
    train(args.demo, config, flags, args.output, args.opts)
    results = args.output / "inference" / "coco_instances_results.json"
    pictures = draw_results(results, f"{args.demo}_val", args.output / "pictures")
    metrics = (args.output / METRICS).read_text().splitlines()
    print(ap_table(json.loads(metrics[-1])))
    print("Pictures:", *pictures, sep="\n  ")
    print(f"Done in {time.time() - start:.0f} s", flush=True)
