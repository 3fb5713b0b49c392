"""Training and evaluation from Detectron2's Python configs (LazyConfig), on any device.

A config has Detectron2's parts: `model`, `optimizer`, `lr_multiplier`, `dataloader` and `train`.
This plugin adds to `train`: `channels_last`, `amp.precision` (auto, fp16 or bf16), `compile` ("",
pyramid or backbone), `fold_norms`, `fast_roi_align`, `accumulate` and `max_loss_ratio`, which are
`SOLVER.ACCUMULATE` and `SOLVER.MAX_LOSS_RATIO`, `ddp.compress`, and `model_ema` and `test_aug`,
which have the keys of `MODEL.EMA` and `TEST.AUG`; a run records its classes in
`train.classes`. A resumed run goes on with the model, the optimizer and the schedule; unlike
:class:`fpn_plugin.engine.trainer.Trainer` it does not go on at the same place in the data.
Loaders with Detectron2's DatasetMapper get
:class:`fpn_plugin.data.mapper.Mapper`, which has `deep_images` too.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from typing import Any, Sequence

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fpn_plugin import plugins
from fpn_plugin.checkpoint.checkpointer import Checkpointer, find_checkpoint
from fpn_plugin.checkpoint.files import fetch, is_remote
from fpn_plugin.checkpoint.record import make_record, plain_config, read_record
from fpn_plugin.checkpoint.run_folder import CONFIG, metric_lines
from fpn_plugin.config.files import find_config_file
from fpn_plugin.config.learning import EMASettings, ema_settings
from fpn_plugin.config.resolve import DATA_FLAGS
from fpn_plugin.data.classes import compare_classes, dataset_classes, recorded_classes
from fpn_plugin.engine import elastic
from fpn_plugin.engine.accumulate import check_parts
from fpn_plugin.engine.agreement import compare_machines, settings_of
from fpn_plugin.engine.ema import EMAHook
from fpn_plugin.engine.faults.actionable import actionable_errors, describe_sizes
from fpn_plugin.engine.faults.divergence import DivergenceRules, last_sizes
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.hooks import (
    EvalHook,
    FlushMetrics,
    LossNormalizerHook,
    build_writers,
    share_statistics,
    trim_metrics,
)
from fpn_plugin.engine.interrupt import InterruptHook, InterruptibleLoader, deferring
from fpn_plugin.engine.launch import check_processes
from fpn_plugin.engine.log import begin_log, write_modules
from fpn_plugin.engine.parallel import make_parallel, read_python_exchange
from fpn_plugin.engine.peers import peers_of, rank_of
from fpn_plugin.engine.preflight import check_batch, refuse_synced, silence
from fpn_plugin.engine.resume import resume_run, warn_of_finished
from fpn_plugin.engine.run_folder import (
    claim_eval_dir,
    claim_output_dir,
)
from fpn_plugin.engine.setup import (
    check_flags,
    is_first,
    prepare_process,
    processes_of,
    require_file,
)
from fpn_plugin.engine.step import build_python_optimizer, make_step_trainer
from fpn_plugin.engine.summary import log_pyramid
from fpn_plugin.engine.warm.start import holds_two_pyramids, load_adapted
from fpn_plugin.evaluation.augmentation import SUFFIX, python_settings
from fpn_plugin.modeling import python_config
from fpn_plugin.modeling.precision import choose_dtype
from fpn_plugin.modeling.python_config import (
    build_part,
    dataset_names,
    device_of,
    read_python_config,
)
from fpn_plugin.modeling.speed import (
    Speed,
    augmented,
    prepare_for_inference,
    prepare_for_training,
)

logger = logging.getLogger(__name__)

_PARTS_KEY = "train.accumulate"
_EMA_KEY = "train.model_ema"

pretrained_timm = python_config.pretrained_timm  # where configs and runs of before name it


def setup(args: argparse.Namespace) -> DictConfig:
    """The config of a run, with its output folder claimed; call it before launching processes.

    Args:
        args: of `fpn_plugin.engine.setup.argument_parser`; its `opts` are `path.key=value`.

    Raises:
        FileNotFoundError: if the config file or `train.init_checkpoint` does not exist.
        ValueError: if the config lacks a part, or an evaluation has no weights.
        FileExistsError: if `train.output_dir` holds another run's results, or another run uses it.
    """
    setup_logger(name="fpn_plugin", distributed_rank=rank_of(args))
    check_flags(args)
    _refuse_data_flags(args)
    args.config_file = find_config_file(args.config_file)
    cfg = read_python_config(args.config_file, args.opts)
    if names := plugins.named():
        cfg.train.imports = [*dict.fromkeys([*cfg.train.get("imports", ()), *names])]
    if device_of(cfg) != cfg.train.device:
        logger.info("train.device is 'cuda' but no GPU is available: using 'cpu'")
    if peers := peers_of(args):
        peers.join(device_of(cfg), settings_of(cfg))
        elastic.recover(args, cfg.train.output_dir, "train.output_dir")
    folder, key = cfg.train.output_dir, "train.output_dir"
    weights = {"train.init_checkpoint": cfg.train.init_checkpoint}
    if args.eval_only:
        _prepare_eval(cfg, args)
    elif peers:
        elastic.claim(args, folder, key, weights)
    elif is_first(args):
        hold(folder, key)
        claim_output_dir(folder, key, weights, args.resume, args.overwrite)
    require_file("train.init_checkpoint", cfg.train.init_checkpoint)
    check_processes(args, device_of(cfg))
    if is_remote(cfg.train.init_checkpoint):
        fetch(cfg.train.init_checkpoint, "train.init_checkpoint")
    if not args.eval_only:
        _preflight(cfg, processes_of(args))
    return cfg


def _preflight(cfg: DictConfig, processes: int) -> None:
    """Check what would fail only in the processes of a run."""
    key, parts = "dataloader.train.total_batch_size", _parts(cfg)
    batch = OmegaConf.select(cfg, key)
    exchange = read_python_exchange(_entries(cfg, "ddp"))
    _ema(cfg)
    if isinstance(batch, int):
        check_batch(key, batch, processes, parts, _PARTS_KEY)
    if processes < 2:
        return
    exchange.check(parts)
    if device_of(cfg) == "cpu":
        with silence():
            model = build_part(cfg, "model", False)
        refuse_synced(None, model)


def _refuse_data_flags(args: argparse.Namespace) -> None:
    """Refuse the flags for own data, which name keys of YAML configs.

    Raises:
        ValueError: naming the flag, and what to do.
    """
    for flag in DATA_FLAGS:
        if path := getattr(args, flag, ""):
            split = "train" if flag.startswith("train") else "test"
            raise ValueError(
                f"--{flag.replace('_', '-')} {path!r} is for YAML configs: a Python config names"
                f" its data in dataloader.{split}.dataset. Call register_coco_instances(NAME, {{}},"
                f" JSON, IMAGES) in {args.config_file}, and give"
                f" dataloader.{split}.dataset.names=NAME"
            )


def begin(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Set up a process of the run before it trains or evaluates: its folder, log and seed."""
    compare_machines(args, cfg, device_of(cfg))
    cfg.train.output_dir = comm.all_gather(cfg.train.output_dir)[0]
    prepare_process(cfg.train.output_dir, device_of(cfg))
    folder = cfg.train.output_dir
    settings = cfg.train
    benchmark = not args.eval_only and settings.get("cudnn_benchmark", False)
    begin_log(folder, settings.get("seed", -1), benchmark)
    # that of a run to be resumed stays until it goes on
    resumes = args.resume and bool(find_checkpoint(folder))
    if comm.is_main_process() and not resumes:
        LazyConfig.save(cfg, os.path.join(folder, CONFIG))


def build_model(cfg: DictConfig, first_weights: bool = True) -> nn.Module:
    """The model on its device, prepared by the entries of `train` that make it faster.

    Args:
        first_weights: whether the network underneath reads its file of weights, which a checkpoint
            of the whole model replaces.
    """
    model = build_part(cfg, "model", first_weights).to(device_of(cfg))
    return prepare_for_training(model, _speed(cfg))


def train(cfg: DictConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train, and evaluate after every `train.eval_period` iterations and at the end.

    Args:
        resume: from the last whole checkpoint in `train.output_dir`.
        overwrite: remove the results of an older run from that folder.

    Returns:
        the results of the last evaluation.

    Raises:
        DivergedError: before a step that would ruin the weights.
        SaveError: if there is no room for a checkpoint or the results of an evaluation.
        WorkerError: if a process that loads data died.
        OutOfMemoryError: with what to lower.
        Interrupted: if SIGTERM or SIGUSR1 has ended the run, with a checkpoint.
    """
    resumes = resume and bool(find_checkpoint(cfg.train.output_dir))
    model = build_model(cfg, first_weights=not resumes)
    optimizer = build_python_optimizer(cfg, model)
    loader = instantiate(cfg.dataloader.train)
    _record_classes(cfg)
    _test_augmentation(cfg, model)
    parallel = make_parallel(model, _device_type(cfg), read_python_exchange(_entries(cfg, "ddp")))
    trainer = make_step_trainer(
        *(parallel, loader, optimizer, _device_type(cfg), _dtype(cfg), _divergence_rules(cfg)),
        *(_parts(cfg), _PARTS_KEY),
    )
    folder, key = cfg.train.output_dir, "train.init_checkpoint"
    checkpointer = Checkpointer(model, folder, key=key, trainer=trainer)
    checkpointer.record = make_record(plain_config(cfg), model, optimizer)
    ema = EMAHook(model, _ema(cfg), _EMA_KEY)
    checkpointer.saving = ema.in_model
    trainer.register_hooks(_hooks(cfg, trainer, ema, model, optimizer, checkpointer))
    start, end = 0, cfg.train.max_iter
    if resumes:
        resume_run(checkpointer, optimizer)
        start = trainer.iter + 1
        if start >= end:
            warn_of_finished(checkpointer, start, "train.max_iter", end, "train.output_dir")
    elif holds_two_pyramids(model):
        load_adapted(model, cfg.train.init_checkpoint, key="train.init_checkpoint")
    else:
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=False)
    elastic.start_run(folder, overwrite)
    if comm.is_main_process():
        if resume:
            trim_metrics(folder, start, end)
        if start < end:  # else the run's stays
            LazyConfig.save(cfg, os.path.join(folder, CONFIG))  # with the classes
            write_modules(folder, model)
            log_pyramid(model)
    key = "dataloader.train.num_workers"
    hints = lambda: _training_hints(cfg, last_sizes(trainer.model))  # noqa: E731
    with deferring(), actionable_errors("training", folder, hints, key):
        trainer.train(start, end)
    return _last_results(trainer, folder)


def evaluate(cfg: DictConfig, model: nn.Module, augments: bool = True) -> dict[str, Any]:
    """The results of `dataloader.evaluator` on `dataloader.test`, or {} if there is no evaluator.

    Its files go to `train.output_dir`/inference unless it says otherwise.

    Args:
        augments: whether, with `train.test_aug.enabled`, the results with test-time augmentation
            follow, as "bbox_TTA".
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    settings, augmentation = cfg.dataloader.evaluator, _test_augmentation(cfg, model)
    if "output_dir" not in settings:
        settings.output_dir = os.path.join(cfg.train.output_dir, "inference")
    loader = InterruptibleLoader(instantiate(cfg.dataloader.test))
    _check_test_classes(cfg)
    prepared = prepare_for_inference(model, _speed(cfg))
    folder, key = cfg.train.output_dir, "dataloader.test.num_workers"
    with actionable_errors("evaluating", folder, lambda: _evaluation_hints(cfg), key):
        results = inference_on_dataset(prepared, loader, instantiate(settings))
        if augments and augmentation is not None:
            logger.info("Evaluating with test-time augmentation (train.test_aug)")
            settings = OmegaConf.merge(settings, {"output_dir": settings.output_dir + SUFFIX})
            tested = augmented(augmentation, prepared)
            more = inference_on_dataset(tested, loader, instantiate(settings))
            results |= {name + SUFFIX: values for name, values in more.items()}
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _test_augmentation(cfg: DictConfig, model: nn.Module) -> CfgNode | None:
    """What `train.test_aug` says, in the keys of `TEST.AUG`; None if it is not enabled."""
    entries = _entries(cfg, "test_aug")
    is_enabled = entries.pop("enabled", False)
    return python_settings(model, entries, "train.test_aug") if is_enabled else None


def _record_classes(cfg: DictConfig) -> None:
    """Let the config say the classes of its training data, which is loaded: `train.classes`."""
    names = dataset_names(cfg, "train")
    classes = dataset_classes(names[0]) if names else None
    if classes is not None:
        cfg.train.classes = {"names": list(classes.names), "ids": list(classes.ids)}


def _check_test_classes(cfg: DictConfig) -> None:
    """Compare the classes of the loaded test data with those that the model was trained on.

    Raises:
        ValueError: with both lists.
    """
    known = recorded_classes({"train": OmegaConf.to_container(cfg.train)}, "train.classes")
    for name in dataset_names(cfg, "test"):
        tested = dataset_classes(name)
        if known and tested:
            compare_classes([known, tested])


def _hooks(
    cfg: DictConfig,
    trainer: SimpleTrainer,
    ema: EMAHook,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpointer: Checkpointer,
) -> list[Any]:
    """Detectron2's hooks and ours; only the main process has those that write."""
    settings, main = cfg.train, comm.is_main_process()
    normalizer = LossNormalizerHook(model, settings.checkpointer.period)
    chosen = [
        hooks.IterationTimer(),
        normalizer,
        ema,
        hooks.LRScheduler(optimizer, scheduler=instantiate(cfg.lr_multiplier)),
    ]
    if main:
        writers = build_writers(settings.output_dir, settings.max_iter)
        chosen.append(FlushMetrics(writers, settings.checkpointer.period))
        chosen.append(hooks.PeriodicCheckpointer(checkpointer, **settings.checkpointer))
    chosen.append(elastic.CopyHook(settings.output_dir, settings.checkpointer.period))

    def evaluate_model() -> dict[str, Any]:
        with ema.in_model():
            share_statistics(model)
            return evaluate(cfg, model, augments=trainer.iter >= settings.max_iter)

    chosen.append(EvalHook(settings.eval_period, evaluate_model, settings.output_dir))
    if main:
        chosen.append(hooks.PeriodicWriter(writers, period=settings.log_period))
    save = functools.partial(elastic.save_now, checkpointer, normalizer)
    chosen.append(InterruptHook(save, settings.checkpointer.period))
    return chosen


def _last_results(trainer: SimpleTrainer, folder: str) -> dict[str, Any]:
    """The results of the evaluation at the end; those of a run that was finished are in its
    metrics.json."""
    latest = {key: value for key, (value, _) in trainer.storage.latest().items()}
    lines = [] if latest else metric_lines(folder)
    values = latest or {key: x for line in lines for key, x in line.items()}
    return {key: value for key, value in values.items() if "/AP" in key}


def _device_type(cfg: DictConfig) -> str:
    return torch.device(device_of(cfg)).type


def _dtype(cfg: DictConfig) -> torch.dtype | None:
    amp = cfg.train.get("amp", {})
    if not amp.get("enabled", False):
        return None
    return choose_dtype(amp.get("precision", "auto"), _device_type(cfg), "train.amp.precision")


def _parts(cfg: DictConfig) -> int:
    return check_parts(_PARTS_KEY, cfg.train.get("accumulate", 1))


def _entries(cfg: DictConfig, section: str) -> dict[str, Any]:
    """Those of a section of `train`, which may be missing."""
    entries: Any = OmegaConf.to_container(cfg.train.get(section) or OmegaConf.create())
    return entries


def _ema(cfg: DictConfig) -> EMASettings | None:
    return ema_settings(_entries(cfg, "model_ema"), _EMA_KEY)


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
    recorded = read_record(cfg.train.init_checkpoint).get("config", {}).get("train", {})
    if "classes" in recorded and "classes" not in cfg.train:
        cfg.train.classes = recorded["classes"]
    if is_first(args):
        cfg.train.output_dir = claim_eval_dir(folder)
    logger.info(
        "Evaluating %s; the results go to %s", cfg.train.init_checkpoint, cfg.train.output_dir
    )


_RATE = ("optimizer.lr", "train.amp.enabled")
_TRAINING = (
    "train.accumulate",
    "dataloader.train.total_batch_size",
    "train.amp.enabled",
    "model.backbone.recompute",
    "model.backbone.out_channels",
)


def _divergence_rules(cfg: DictConfig) -> DivergenceRules:
    ratio = cfg.train.get("max_loss_ratio", DivergenceRules.max_ratio)
    advice = f"a lower rate, clipped gradients, no AMP: {', '.join(_present_values(cfg, _RATE))}"
    return DivergenceRules(ratio, "train.max_loss_ratio", advice, cfg.train.output_dir)


def _training_hints(cfg: DictConfig, sizes: Sequence[tuple[int, ...]] = ()) -> list[str]:
    """What saves memory in training: :func:`actionable.training_hints` for a Python config."""
    return [*_present_values(cfg, _TRAINING), _image_size(cfg, "train") + describe_sizes(sizes)]


def _evaluation_hints(cfg: DictConfig) -> list[str]:
    return [_image_size(cfg, "test"), *_present_values(cfg, ("train.amp.enabled",))]


def _image_size(cfg: DictConfig, split: str) -> str:
    resize = f"dataloader.{split}.mapper.augmentations[0]"
    return " and ".join(_present_values(cfg, (f"{resize}.short_edge_length", f"{resize}.max_size")))


def _present_values(cfg: DictConfig, keys: Sequence[str]) -> list[str]:
    return [f"{key} ({OmegaConf.select(cfg, key, default='not set')})" for key in keys]
