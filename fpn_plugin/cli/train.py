"""Train or evaluate a detector, on GPUs or on the CPU, by Detectron2's command line.

fpn train --config-file FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE …]
fpn train --config-file FILE --eval-only [--allow-partial] MODEL.WEIGHTS model.pth
fpn train --config-file FILE --train-json a.json --train-images a/ --val-json … --val-images …
fpn train --config-file FILE --num-gpus 2 MODEL.DEVICE cpu      two processes without a GPU
"""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer
from fpn_plugin.cli.arguments import add_common_flags, split_overrides
from fpn_plugin.engine.launch import launch_ranks
from fpn_plugin.engine.log import write_modules
from fpn_plugin.engine.run_folder import remove_old_run
from fpn_plugin.engine.setup import argument_parser, begin, setup
from fpn_plugin.engine.summary import log_end
from fpn_plugin.engine.trainer import Trainer


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser()
    parser.prog, parser.description = "fpn train", __doc__
    add_common_flags(parser)
    words, pairs = split_overrides(argv)
    args = parser.parse_args(words)
    args.opts = [*args.opts, *pairs]
    return args


def run(args: argparse.Namespace) -> None:
    cfg = setup(args)
    launch_ranks(train, args, (cfg, args), cfg.MODEL.DEVICE)


def train(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Train or evaluate, in one of the launched processes."""
    cfg = begin(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        if comm.is_main_process():
            write_modules(cfg.OUTPUT_DIR, model)
        checkpointer = StrictCheckpointer(model, "", args.allow_partial, "MODEL.WEIGHTS")
        checkpointer.load(cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if args.overwrite and comm.is_main_process():
        remove_old_run(cfg.OUTPUT_DIR)  # only now, as nothing can refuse to start any more
    results = trainer.train()
    if comm.is_main_process():
        log_end(cfg.OUTPUT_DIR, next(iter(cfg.DATASETS.TEST), ""))
    return results
