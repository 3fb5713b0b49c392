#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/trees: tiles of aerial photos with a box around every tree crown."""

import argparse
from pathlib import Path

from fpn_plugin.data.trees import TreeOptions, prepare_trees
from fpn_plugin.paths import dataset_root


def main() -> None:
    default = TreeOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads, if not ROOT/.wheels")
    parser.add_argument("--tile", type=int, default=default.tile, help="side of a tile, pixels")
    parser.add_argument("--stride", type=int, default=default.stride, help="of training tiles")
    parser.add_argument("--val-stride", type=int, default=default.val_stride, help="of validation")
    parser.add_argument(
        "--min-visible",
        type=float,
        default=default.min_visible,
        help="keep a box cut by a tile's border if this fraction of its area is inside",
    )
    args = parser.parse_args()
    options = TreeOptions(args.tile, args.stride, args.val_stride, args.min_visible)
    made = prepare_trees(args.root, options, args.cache)
    print(f"{'Made' if made else 'Already there'}: {args.root / 'trees'}")


if __name__ == "__main__":
    main()
