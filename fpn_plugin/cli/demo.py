"""Train a detector on a small dataset in minutes, and draw what it finds.

fpn demo trees --output output/demo            boxes of tree crowns in aerial photos
fpn demo cells --output output/demo-masks      masks of nuclei and micronuclei in micrographs
fpn demo scenes --output output/demo-scenes    masks of shapes in drawn scenes
fpn demo trees --data-only                     its data and weights alone, to train by hand

The data goes to $DETECTRON2_DATASETS, or to ./datasets where that is not set. Then `fpn train` runs
on quickstart/faster_rcnn_trees_FPN.yaml or quickstart/mask_rcnn_NAME_FPN.yaml, as one would do by
hand; the whole log is in OUTPUT/log.txt. A demo that was interrupted goes on where it stopped, a
finished one is run anew, and a folder with the results of any other run is refused.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin import plugins
from fpn_plugin.cli.arguments import OVERRIDES_HELP, command_parser, parse
from fpn_plugin.compare.runs import RESULTS
from fpn_plugin.engine.run_folder import METRICS, claim_demo_dir
from fpn_plugin.engine.setup import load_config
from fpn_plugin.evaluation.augmentation import KEY, SUFFIX
from fpn_plugin.evaluation.coco_metrics import detection_limit
from fpn_plugin.evaluation.scores import Score, load_truth, score_results
from fpn_plugin.paths import configs_dir, dataset_root, makers_dir
from fpn_plugin.report.progress import ap_table, show_training
from fpn_plugin.visualize.results import draw_results

CONFIGS = {
    "trees": "quickstart/faster_rcnn_trees_FPN.yaml",
    "cells": "quickstart/mask_rcnn_cells_FPN.yaml",
    "scenes": "quickstart/mask_rcnn_scenes_FPN.yaml",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("demo", __doc__)
    add = parser.add_argument
    add("demo", choices=CONFIGS, help="what is trained on")
    add("--output", type=Path, metavar="DIR", help="of the run and its pictures")
    add("--data-only", action="store_true", help="stop when the data and the weights are there")
    add("opts", nargs="*", metavar="KEY VALUE", help=OVERRIDES_HELP)
    args = parse(parser, argv)
    if bool(args.output) == args.data_only:
        parser.error("give --output DIR, or --data-only")
    return args


def prepare(demo: str) -> None:
    """Make the data and the ImageNet weights, where they are not there yet.

    Raises:
        RuntimeError: if one cannot be made, with what to do.
    """
    root = dataset_root()
    print(f"Preparing {demo} and the ImageNet weights in {root}/", flush=True)
    # scripts, which import each other by their names alone
    sys.path.insert(0, str(makers_dir()))
    for maker in ("weights", demo):
        name = f"prepare_{maker}"
        try:
            getattr(importlib.import_module(name), name)(root)
        except (ImportError, RuntimeError, ValueError) as error:
            raise RuntimeError(f"{demo}: the {maker} cannot be made: {error}") from error


def train(
    cfg: CfgNode, name: str, config: Path, flags: list[str], output: Path, opts: list[str]
) -> None:
    """Run `fpn train`, and show its progress and warnings."""
    command = [sys.executable, "-m", "fpn_plugin", "train"]
    command += [*plugins.flags(plugins.named()), "--config-file", str(config), *flags]
    command += ["OUTPUT_DIR", str(output), *opts]
    show_training(command, name, cfg.SOLVER.MAX_ITER, output / METRICS)


def print_ap(results: Path, dataset: str, limit: int) -> None:
    """Print the AP of all objects, and of each class if there are several, by size.

    Args:
        results: the file that COCOEvaluator wrote.
        limit: the detections of a class in an image that count.
    """
    truth = load_truth(dataset)
    if isinstance(truth, str):
        raise RuntimeError(truth)
    scores = score_results(json.loads(results.read_text()), truth, limit)
    if not scores:
        print("AP: 0, the model finds nothing")
        return
    print(ap_table({task: _rows(score) for task, score in scores.items()}))


def _rows(score: Score) -> dict[str, Mapping[str, float]]:
    return {"": score.metrics, **(score.by_class if len(score.by_class) > 1 else {})}


def run(args: argparse.Namespace) -> None:
    if args.data_only:
        prepare(args.demo)
        print(f"They are there; to train: fpn train --config-file {CONFIGS[args.demo]}")
        return
    start = time.time()
    flags = claim_demo_dir(str(args.output), args.demo)
    prepare(args.demo)
    config = configs_dir() / CONFIGS[args.demo]
    cfg = load_config(argparse.Namespace(config_file=str(config), opts=args.opts))
    print(f"Training {CONFIGS[args.demo]}", *flags, flush=True)
    train(cfg, args.demo, config, flags, args.output, args.opts)
    folder, dataset = args.output / "inference", cfg.DATASETS.TEST[0]
    results, limit = folder / RESULTS, detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    pictures = draw_results(results, dataset, args.output / "pictures")
    print_ap(results, dataset, limit)
    if cfg.TEST.AUG.ENABLED:
        print(f"With test-time augmentation ({KEY}):")
        print_ap(folder.with_name(folder.name + SUFFIX) / RESULTS, dataset, limit)
    print("Pictures:", *pictures, sep="\n  ")
    print(f"Done in {time.time() - start:.0f} s", flush=True)
