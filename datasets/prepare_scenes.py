#!/usr/bin/env python3
"""Draw $DETECTRON2_DATASETS/scenes: textured shapes with masks, the same for the same seed."""

import argparse
from pathlib import Path

from fpn_plugin.data.scenes import SceneOptions, prepare_scenes
from fpn_plugin.paths import dataset_root


def main() -> None:
    default = SceneOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--train", type=int, default=default.train, help="training pictures")
    parser.add_argument("--val", type=int, default=default.val, help="validation pictures")
    parser.add_argument("--width", type=int, default=default.width, help="of a picture, pixels")
    parser.add_argument("--height", type=int, default=default.height, help="of a picture, pixels")
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything random")
    args = parser.parse_args()
    options = SceneOptions(
        train=args.train, val=args.val, width=args.width, height=args.height, seed=args.seed
    )
    made = prepare_scenes(args.root, options)
    print(f"{'Made' if made else 'Already there'}: {args.root / 'scenes'}")


if __name__ == "__main__":
    main()
