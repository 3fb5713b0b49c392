"""Train or evaluate from one of Detectron2's Python configs (LazyConfig), on GPUs or on the CPU.

fpn train-lazy --config-file FILE.py [--num-gpus N] [--resume | --overwrite] [KEY=VALUE …]
fpn train-lazy --config-file FILE.py --eval-only train.init_checkpoint=model.pth
fpn train-lazy --config-file FILE.py --num-gpus 2 train.device=cpu   two processes, no GPU
"""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from detectron2.engine import default_argument_parser
from omegaconf import DictConfig

from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer
from fpn_plugin.checkpoint.fit import PARTIAL_HELP
from fpn_plugin.cli.arguments import add_common_flags
from fpn_plugin.engine import lazy
from fpn_plugin.engine.launch import add_rank_timeout, launch_ranks


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser()
    parser.prog, parser.description = "fpn train-lazy", __doc__
    add_common_flags(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that train.output_dir holds"
    )
    parser.add_argument("--allow-partial", action="store_true", help=f"--eval-only: {PARTIAL_HELP}")
    add_rank_timeout(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    cfg = lazy.setup(args)
    launch_ranks(train, args, (cfg, args), lazy.device_of(cfg))


def train(cfg: DictConfig, args: argparse.Namespace) -> Any:
    """Train or evaluate, in one of the launched processes."""
    lazy.begin(cfg, args)
    if args.eval_only:
        model = lazy.build_model(cfg)
        key = "train.init_checkpoint"
        checkpointer = StrictCheckpointer(model, "", args.allow_partial, key)
        checkpointer.load(cfg.train.init_checkpoint)
        return lazy.evaluate(cfg, model)
    return lazy.train(cfg, args.resume, args.overwrite)
