#!/usr/bin/env python3
"""Train or evaluate from one of Detectron2's Python configs (LazyConfig), on GPUs or on the CPU.

lazyconfig_train_net.py --config-file FILE.py [--num-gpus N] [--resume | --overwrite] [KEY=VALUE …]
lazyconfig_train_net.py --config-file FILE.py --eval-only train.init_checkpoint=model.pth
lazyconfig_train_net.py --config-file FILE.py --num-gpus 2 train.device=cpu   two processes, no GPU
"""

import os

# before torch is imported: its OpenMP workers otherwise spin and starve a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402
from typing import Any  # noqa: E402

from detectron2.engine import default_argument_parser  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

import fpn_plugin  # noqa: E402, F401  (registers the datasets)
from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer  # noqa: E402
from fpn_plugin.checkpoint.fit import PARTIAL_HELP  # noqa: E402
from fpn_plugin.engine import lazy  # noqa: E402
from fpn_plugin.engine.launch import add_rank_timeout, launch_ranks  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = default_argument_parser()
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that train.output_dir holds"
    )
    parser.add_argument("--allow-partial", action="store_true", help=f"--eval-only: {PARTIAL_HELP}")
    add_rank_timeout(parser)
    return parser.parse_args()


def main(cfg: DictConfig, args: argparse.Namespace) -> Any:
    """Train or evaluate, in one of the launched processes."""
    lazy.begin(cfg, args)
    if args.eval_only:
        model = lazy.build_model(cfg)
        key = "train.init_checkpoint"
        checkpointer = StrictCheckpointer(model, "", args.allow_partial, key)
        checkpointer.load(cfg.train.init_checkpoint)
        return lazy.evaluate(cfg, model)
    return lazy.train(cfg, args.resume, args.overwrite)


if __name__ == "__main__":
    arguments = parse_args()
    config = lazy.setup(arguments)
    launch_ranks(main, arguments, (config, arguments), lazy.device_of(config))
