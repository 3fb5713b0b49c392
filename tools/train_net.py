#!/usr/bin/env python3
"""Train or evaluate any Detectron2 detector, on GPUs or on the CPU: Detectron2's command line.

train_net.py --config-file FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE …]
train_net.py --config-file FILE --eval-only [--allow-partial] MODEL.WEIGHTS model.pth
train_net.py --config-file FILE --train-json a.json --train-images a/ --val-json … --val-images …
train_net.py --config-file FILE --num-gpus 2 MODEL.DEVICE cpu      two processes without a GPU
"""

import os

# before torch is imported: its OpenMP workers otherwise spin and starve a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402
from typing import Any  # noqa: E402

from detectron2.config import CfgNode  # noqa: E402
from detectron2.evaluation import verify_results  # noqa: E402
from detectron2.utils import comm  # noqa: E402

import fpn_plugin  # noqa: E402, F401  (registers the builders and the datasets)
from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer  # noqa: E402
from fpn_plugin.engine.launch import launch_ranks  # noqa: E402
from fpn_plugin.engine.run_folder import remove_old_run  # noqa: E402
from fpn_plugin.engine.setup import argument_parser, begin, setup  # noqa: E402
from fpn_plugin.engine.trainer import Trainer  # noqa: E402


def main(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Train or evaluate, in one of the launched processes."""
    cfg = begin(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
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
    return trainer.train()


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    config = setup(arguments)
    launch_ranks(main, arguments, (config, arguments), config.MODEL.DEVICE)
