#!/usr/bin/env python3
"""Draw what a trained detector found beside what is there, from the results that its evaluation
wrote.

    python tools/draw_detections.py --results OUTPUT_DIR/inference/coco_instances_results.json
    --dataset trees_val \\
        --output pictures/ [--num 4] [--score 0.5] [--config-file OUTPUT_DIR/config.yaml]

The config is only needed for your own data (own_train, own_val): it says where they are.
"""

import os

# before torch is imported: its OpenMP workers otherwise spin, which starves a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402

import fpn_plugin  # noqa: E402, F401  (registers the datasets)
from fpn_plugin.analysis.pictures import draw_dataset  # noqa: E402
from fpn_plugin.config import load_config  # noqa: E402
from fpn_plugin.data import register_own  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", required=True, metavar="FILE", help="coco_instances_results.json"
    )
    parser.add_argument(
        "--dataset", required=True, metavar="NAME", help="the dataset that it is of"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument(
        "--num", type=int, default=4, help="number of pictures, at most (default: 4)"
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score that is drawn (default: 0.5)"
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="of the run, for your own data"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.config_file:
        args.opts = ["MODEL.WEIGHTS", ""]  # which need not be there any more
        register_own(load_config(args))
    for path in draw_dataset(args.results, args.dataset, args.output, args.num, args.score):
        print(path)


if __name__ == "__main__":
    main()
