#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/weights: ImageNet weights for the quickstart's bottom-up network."""

import argparse
from pathlib import Path

from fpn_plugin.data.weights import prepare_weights
from fpn_plugin.paths import dataset_root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads (default: ROOT/.wheels)")
    args = parser.parse_args()
    print(f"Ready: {prepare_weights(args.root, args.cache)}")


if __name__ == "__main__":
    main()
