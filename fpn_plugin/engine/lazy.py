"""Training and evaluation from Detectron2's Python configs (LazyConfig), on any device.

The parts of a config are Detectron2's: `model`, `optimizer`, `lr_multiplier`, `dataloader` and
`train`. These entries of `train` are this plugin's: `channels_last`, `amp.precision` (auto, fp16 or
bf16), `compile` ("", pyramid or backbone), `fold_norms`, `fast_roi_align` and `max_loss_ratio`,
which is `SOLVER.MAX_LOSS_RATIO`. A resumed run goes on with the model, the optimizer and the
schedule; unlike :class:`fpn_plugin.engine.trainer.Trainer` it does not go on at the same place in
the data.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any, Sequence

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from fpn_plugin.bottom_up.timm import TimmBackbone
from fpn_plugin.bottom_up.weights import load_weights
from fpn_plugin.engine.amp import choose_dtype, make_step_trainer
from fpn_plugin.engine.checkpoint import Checkpointer, find_checkpoint
from fpn_plugin.engine.dense import LossNormalizerHook
from fpn_plugin.engine.faults.eval_hook import EvalHook
from fpn_plugin.engine.faults.explained import explained
from fpn_plugin.engine.faults.lazy_advice import divergence_rules, evaluation_hints, training_hints
from fpn_plugin.engine.faults.watched import last_sizes
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.metrics import FlushMetrics, build_writers, trim_metrics
from fpn_plugin.engine.run_folder import claim_eval_dir, remove_old_run
from fpn_plugin.engine.run_record import run_results
from fpn_plugin.engine.speed import Speed, prepare_for_inference, prepare_for_training
from fpn_plugin.engine.warm.start import holds_two_pyramids, load_adapted

logger = logging.getLogger(__name__)

_PARTS = ("model", "optimizer", "lr_multiplier", "dataloader", "train")


def pretrained_timm(
    model: str, weights: str = "", out_features: Sequence[str] = (), **settings: Any
) -> TimmBackbone:
    """A timm network with the weights of a file, for a config's `bottom_up`.

    Args:
        model: timm's name for it.
        weights: the file; "" starts from the initialisation.
        out_features: and `settings`: of :class:`TimmBackbone`.
    """
    backbone = TimmBackbone(model, list(out_features), **settings)
    if weights:
        load_weights(backbone.model, weights, "bottom_up.weights")
    return backbone


def setup(args: argparse.Namespace) -> DictConfig:
    """The config of a run, with its output folder claimed; for once, before processes are launched.

    Args:
        args: of `fpn_plugin.engine.setup.argument_parser`; its `opts` are `path.key=value`.

    Raises:
        FileNotFoundError: if the config file or `train.init_checkpoint` does not exist.
        ValueError: if the config lacks a part, or an evaluation has no weights.
        FileExistsError: if `train.output_dir` holds another run's results, or another is at work.
    """
    setup_logger(name="fpn_plugin")
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only:
        _prepare_eval(cfg, args)
    else:
        _claim(cfg, args)
    _require_file(cfg.train.init_checkpoint)
    processes = args.num_gpus * args.num_machines
    if processes > 1 and cfg.train.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # detectron2's launch takes gloo if it sees no GPU
    return cfg


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A Python config with its overrides, on the CPU where there is no GPU.

    Args:
        overrides: `path.key=value` each.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the config lacks one of its parts.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--config-file {path!r} does not exist")
    cfg = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides or ()))
    if missing := [part for part in _PARTS if part not in cfg]:
        raise ValueError(f"{path}: the config lacks {', '.join(missing)}")
    if cfg.train.device == "cuda" and not torch.cuda.is_available():
        cfg.train.device = "cpu"
        logger.info("train.device is 'cuda' but no GPU is available: using 'cpu'")
    return cfg


def begin(cfg: DictConfig, args: argparse.Namespace) -> None:
    """What each launched process does first: the folder, the logs, the seed."""
    cfg.train.output_dir = comm.all_gather(cfg.train.output_dir)[0]
    fresh = not logging.getLogger("fpn_plugin").handlers
    folder = cfg.train.output_dir
    setup_logger(folder, comm.get_rank(), name="fpn_plugin", configure_stdout=fresh)
    if cfg.train.device == "cpu" and comm.get_local_size() > 1:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
    default_setup(cfg, args)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model on its device, with what of `train` makes it faster."""
    return prepare_for_training(instantiate(cfg.model).to(cfg.train.device), _speed(cfg))


def train(cfg: DictConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train, and evaluate after every `train.eval_period` iterations and at the end.

    Args:
        resume: go on from the last whole checkpoint in `train.output_dir`.
        overwrite: remove the results that lie there, now that nothing can refuse to start.

    Returns:
        the results of the last evaluation.

    Raises:
        DivergedError: before a step that would ruin the weights, with where that begins.
        SaveError: if there is no room for a checkpoint or an evaluation's results.
        WorkerError: if a process that loads data died.
        OutOfMemoryError: with what to lower.
    """
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    # DDP on the CPU refuses device_ids; None leaves the choice to it
    device_ids = [comm.get_local_rank()] if _device_type(cfg) == "cuda" else None
    parallel = create_ddp_model(model, device_ids=device_ids, **cfg.train.get("ddp", {}))
    kind = _device_type(cfg), _dtype(cfg)
    trainer = make_step_trainer(parallel, loader, optimizer, *kind, divergence_rules(cfg))
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(_hooks(cfg, model, optimizer, checkpointer))
    goes_on = resume and checkpointer.has_checkpoint()
    if holds_two_pyramids(model) and not goes_on:
        load_adapted(model, cfg.train.init_checkpoint, key="train.init_checkpoint")
    else:
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if goes_on else 0
    if overwrite and comm.is_main_process():
        remove_old_run(cfg.train.output_dir)
    elif resume and comm.is_main_process():
        trim_metrics(cfg.train.output_dir, start)
    folder, key = cfg.train.output_dir, "dataloader.train.num_workers"
    with explained("training", folder, lambda: training_hints(cfg, last_sizes(trainer.model)), key):
        trainer.train(start, cfg.train.max_iter)
    return _last_results(trainer)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """The results of `dataloader.evaluator` on `dataloader.test`, or {} if there is no evaluator.

    Its files go to `train.output_dir`/inference unless it says otherwise.
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    settings = cfg.dataloader.evaluator
    if "output_dir" not in settings:
        settings.output_dir = os.path.join(cfg.train.output_dir, "inference")
    loader = instantiate(cfg.dataloader.test)
    prepared = prepare_for_inference(model, _speed(cfg))
    folder, key = cfg.train.output_dir, "dataloader.test.num_workers"
    with explained("evaluating", folder, lambda: evaluation_hints(cfg), key):
        results = inference_on_dataset(prepared, loader, instantiate(settings))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _hooks(
    cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer, checkpointer: Checkpointer
) -> list[Any]:
    """Detectron2's; checkpoints, and what is written of them, by the main process alone."""
    settings, main = cfg.train, comm.is_main_process()
    chosen = [
        hooks.IterationTimer(),
        LossNormalizerHook(model),
        hooks.LRScheduler(optimizer, scheduler=instantiate(cfg.lr_multiplier)),
    ]
    if main:
        writers = build_writers(settings.output_dir, settings.max_iter)
        chosen.append(FlushMetrics(writers, settings.checkpointer.period))
        chosen.append(hooks.PeriodicCheckpointer(checkpointer, **settings.checkpointer))
    chosen.append(EvalHook(settings.eval_period, lambda: evaluate(cfg, model)))
    if main:
        chosen.append(hooks.PeriodicWriter(writers, period=settings.log_period))
    return chosen


def _last_results(trainer: SimpleTrainer) -> dict[str, Any]:
    """What the evaluation at the end left in the trainer's storage, by metric."""
    latest = trainer.storage.latest()
    return {key: value for key, (value, _) in latest.items() if "/AP" in key}


def _device_type(cfg: DictConfig) -> str:
    return torch.device(cfg.train.device).type


def _dtype(cfg: DictConfig) -> torch.dtype | None:
    amp = cfg.train.get("amp", {})
    if not amp.get("enabled", False):
        return None
    return choose_dtype(amp.get("precision", "auto"), _device_type(cfg), "train.amp.precision")


def _speed(cfg: DictConfig) -> Speed:
    return Speed(
        _device_type(cfg),
        _dtype(cfg),
        cfg.train.get("channels_last", False),
        cfg.train.get("fold_norms", False),
        cfg.train.get("compile", ""),
        cfg.train.get("fast_roi_align", False),
        "train.compile",
    )


def _prepare_eval(cfg: DictConfig, args: argparse.Namespace) -> None:
    folder = cfg.train.output_dir
    if args.resume:
        cfg.train.init_checkpoint = find_checkpoint(folder)
    if not cfg.train.init_checkpoint:
        raise ValueError(
            "--eval-only: train.init_checkpoint is empty; name a checkpoint, or give --resume for"
            f" the last one in train.output_dir {folder!r}"
        )
    if args.machine_rank == 0:
        cfg.train.output_dir = claim_eval_dir(folder)
    logger.info(
        "Evaluating %s; the results go to %s", cfg.train.init_checkpoint, cfg.train.output_dir
    )


def _claim(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Let a training run have `train.output_dir`, or refuse; nothing in it is changed."""
    folder, weights = cfg.train.output_dir, cfg.train.init_checkpoint
    if args.machine_rank == 0:
        hold(folder, "train.output_dir")
    found = run_results(folder) if args.machine_rank == 0 else []
    if args.resume and args.overwrite:
        raise ValueError(
            "--resume keeps the run in train.output_dir and --overwrite removes it: choose one"
        )
    if args.overwrite and weights and Path(weights).resolve() in [f.resolve() for f in found]:
        raise ValueError(
            f"train.init_checkpoint {weights!r} would be removed by --overwrite: choose another"
            " train.output_dir"
        )
    if found and not args.resume and not args.overwrite:
        names = ", ".join(file.name for file in found[:5])
        raise FileExistsError(
            f"train.output_dir {folder!r} holds another run's results ({names}). Give --resume to"
            " go on with that run, --overwrite to replace it, or another train.output_dir"
        )


def _require_file(path: str) -> None:
    plain = path.partition("?")[0]  # Detectron2 takes options after it
    if plain and "://" not in plain and not os.path.isfile(plain):
        raise FileNotFoundError(f"train.init_checkpoint {path!r}: there is no such file")
