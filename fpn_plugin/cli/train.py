"""Train or evaluate a detector, on GPUs or on the CPU, by Detectron2's command line.

fpn train FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE …]
fpn train FILE --eval-only [--allow-partial] MODEL.WEIGHTS model.pth
fpn train FILE --train-json a.json --train-images a/ --val-json … --val-images …
fpn train FILE --num-gpus 2 MODEL.DEVICE cpu      two processes without a GPU
fpn train FILE.py [the same flags] [path.key=value …]      a Python config (LazyConfig)

FILE may also be given by --config-file. A Python config is code, which is run when it is read: give
only one that you trust. Its keys are others: train.init_checkpoint, train.device, train.output_dir.
"""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from omegaconf import DictConfig

from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer
from fpn_plugin.cli.arguments import add_common_flags, split_overrides
from fpn_plugin.engine import lazy
from fpn_plugin.engine.elastic import start_run
from fpn_plugin.engine.launch import launch_ranks
from fpn_plugin.engine.log import write_modules
from fpn_plugin.engine.setup import argument_parser, begin, setup
from fpn_plugin.engine.summary import log_end
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.modeling.python_config import is_python_config

_CONFIGS = (".py", ".yaml", ".yml")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser()
    parser.prog, parser.description = "fpn train", __doc__
    add_common_flags(parser)
    words, pairs = split_overrides(argv)
    args = parser.parse_args(words)
    if args.opts and _is_file(args.opts[0]):  # the config as the first word; flags may follow
        if args.config_file:
            parser.error(f"two configs: --config-file {args.config_file} and {args.opts[0]}")
        place = len(words) - len(args.opts)
        words = [*words[:place], f"--config-file={words[place]}", *words[place + 1 :]]
        args = parser.parse_args(words)
    args.opts = [*args.opts, *pairs]
    return args


def _is_file(word: str) -> bool:
    """Whether a word names a config, and is no override of one."""
    return word.endswith(_CONFIGS) and "=" not in word or "/" in word.partition("=")[0]


def run(args: argparse.Namespace) -> None:
    if is_python_config(args.config_file):
        python = lazy.setup(args)
        launch_ranks(train_python, args, (python, args), lazy.device_of(python))
        return
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
    start_run(cfg.OUTPUT_DIR, args.overwrite)
    results = trainer.train()
    if comm.is_main_process():
        log_end(cfg.OUTPUT_DIR, next(iter(cfg.DATASETS.TEST), ""))
    return results


def train_python(cfg: DictConfig, args: argparse.Namespace) -> Any:
    """Train or evaluate what a Python config says, in one of the launched processes."""
    lazy.begin(cfg, args)
    if args.eval_only:
        model = lazy.build_model(cfg, first_weights=args.allow_partial)
        key = "train.init_checkpoint"
        checkpointer = StrictCheckpointer(model, "", args.allow_partial, key)
        checkpointer.load(cfg.train.init_checkpoint)
        return lazy.evaluate(cfg, model)
    return lazy.train(cfg, args.resume, args.overwrite)
