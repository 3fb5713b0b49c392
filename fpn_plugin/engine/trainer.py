"""Detectron2's DefaultTrainer on any device, with exact resume and atomic checkpoints."""

from __future__ import annotations

import logging
import os
import weakref
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.record import make_record, plain_config
from fpn_plugin.checkpoint.run_folder import run_results
from fpn_plugin.config.heads import check_heads_when_built
from fpn_plugin.config.learning import check_schedule
from fpn_plugin.config.resolve import as_recorded
from fpn_plugin.config.validate import check_pixels, plugin_config
from fpn_plugin.data.classes import check_test_classes, tag_model, with_classes_of
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.engine.data import build_train_loader, start_at
from fpn_plugin.engine.elastic import CopyHook, save_now, schedule_processes
from fpn_plugin.engine.ema import build_ema_hook
from fpn_plugin.engine.faults.actionable import (
    actionable_errors,
    evaluation_hints,
    training_hints,
)
from fpn_plugin.engine.faults.divergence import last_sizes
from fpn_plugin.engine.faults.skipping import CountedLoader, SkipCounter, TestMapper
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.hooks import (
    EvalHook,
    FlushMetrics,
    LossNormalizerHook,
    MissedEvaluation,
    build_writers,
    replace_eval_hooks,
    share_statistics,
    trim_metrics,
)
from fpn_plugin.engine.interrupt import InterruptHook, InterruptibleLoader, deferring
from fpn_plugin.engine.log import write_modules
from fpn_plugin.engine.parallel import make_parallel, read_exchange
from fpn_plugin.engine.resume import resume_run, warn_of_finished
from fpn_plugin.engine.rng import SeedHook
from fpn_plugin.engine.run_folder import refuse_results
from fpn_plugin.engine.setup import data_counts, has_begun, prepare_config, write_config
from fpn_plugin.engine.step import build_optimizer, build_step_trainer
from fpn_plugin.engine.summary import log_summary
from fpn_plugin.engine.warm.start import start_warm
from fpn_plugin.evaluation.augmentation import SUFFIX, check_test_augmentation
from fpn_plugin.evaluation.build import build_evaluator
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.precision import device_type
from fpn_plugin.modeling.speed import augmented, prepare_for_inference, prepare_for_training

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer that also runs on the CPU, and resumes exactly.

    A run that was killed and resumed ends with the weights of an unbroken one: bit for bit on the
    CPU, and on a GPU as far as its kernels are deterministic. The statistics of `TEST.PRECISE_BN`
    are an exception, as that hook starts over with its own data.

    With the config of a command line that has begun (:func:`fpn_plugin.engine.setup.begin`) it
    goes on from there. With any other config, as in a notebook, it does the same by itself: it
    checks the data and what the evaluators need, and when it loads weights or starts to train it
    claims `OUTPUT_DIR` and writes config.yaml.

    Args:
        cfg: Detectron2's keys and this plugin's. A negative `SEED` is replaced by a random one.

    Attributes:
        cfg: the config with the run's seed in it, and the classes of its training data.
        ema: of `MODEL.EMA`; within `ema.in_model()` the model has the averaged weights.

    Raises:
        ValueError: if the data is bad, or does not fit the model.
    """

    iter: int

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer.__init__ would wrap the model and build a step trainer that need CUDA
        super(DefaultTrainer, self).__init__()
        cfg = plugin_config(cfg)
        self._is_begun = has_begun(cfg)
        if not self._is_begun:
            cfg = prepare_config(cfg)
            # before the writers of this run begin theirs
            self._old_results = comm.all_gather(run_results(cfg.OUTPUT_DIR))[0]
        processes = schedule_processes(comm.get_world_size())
        self.cfg = cfg = _with_seed(DefaultTrainer.auto_scale_workers(cfg, processes))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER

        exchange = read_exchange(cfg)
        if comm.get_world_size() > 1:
            exchange.check(cfg.SOLVER.ACCUMULATE)
        model = self.build_model(cfg)
        tag_model(model, cfg)
        optimizer = self.build_optimizer(cfg, model)
        skips = cfg.DATALOADER.ON_ERROR == "skip"
        self._skips = SkipCounter(cfg.OUTPUT_DIR) if skips else None
        data_loader = self._counted_loader()
        self._model = make_parallel(model, device_type(cfg), exchange)
        self._trainer = build_step_trainer(cfg, self._model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.checkpointer.record = make_record(plain_config(as_recorded(cfg)), model, optimizer)
        self._seed_hook = SeedHook(cfg.SEED)
        normalizer = LossNormalizerHook(model, cfg.SOLVER.CHECKPOINT_PERIOD)
        self.ema = build_ema_hook(cfg, model)
        self.checkpointer.saving = self.ema.in_model
        state_hooks = (self._seed_hook, normalizer, self.ema, self._skips)
        self.register_hooks([*state_hooks, *self.build_hooks()])
        save = partial(save_now, self.checkpointer, normalizer)
        self.register_hooks([InterruptHook(save, cfg.SOLVER.CHECKPOINT_PERIOD)])

    @property
    def model(self) -> nn.Module:
        """The model, in DDP if there are several processes, but without autocast."""
        return self._model

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last whole checkpoint in `OUTPUT_DIR`, or else load `MODEL.WEIGHTS`.

        With `MODEL.FPN.WARM_START` the weights are converted for the model's pyramid.

        Raises:
            FileExistsError: if `OUTPUT_DIR` holds another run's results and `resume` is False, or
                if another run is at work there.
            ResumeError: if the checkpoint was made with another model, optimizer or other classes.
            ValueError: if `OUTPUT_DIR` holds checkpoints of which none is whole.
            RuntimeError: if the processes do not all see the same checkpoint.
        """
        self._claim_folder(resume)
        if resume and self.checkpointer.has_checkpoint():
            self._resume()
        elif self.cfg.MODEL.FPN.WARM_START:
            start_warm(self.checkpointer.model, self.cfg)
        else:
            super().resume_or_load(resume=False)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"the processes would start at iterations {starts}: OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR!r} must be the same folder on all machines"
            )
        if self._seed_hook.seed != self.cfg.SEED:
            self._adopt_seed(self._seed_hook.seed)
        start_at(self.data_loader, self.start_iter)
        self._write_config()
        if resume and comm.is_main_process():
            trim_metrics(self.cfg.OUTPUT_DIR, self.start_iter, self.max_iter)

    def train(self) -> Any:
        """Train to the end.

        Returns:
            the results of the last evaluation.

        Raises:
            DivergedError: before a step that would ruin the weights.
            SaveError: if there is no room for a checkpoint or the results of an evaluation.
            WorkerError: if a process that loads data died.
            OutOfMemoryError: with what to lower.
            Interrupted: if SIGTERM or SIGUSR1 has ended the run, with a checkpoint.
        """
        if not self._is_begun:
            self._claim_folder(resume=False)
            self._write_config()
        folder, model = self.cfg.OUTPUT_DIR, self._trainer.model
        if comm.is_main_process() and self.start_iter < self.max_iter:
            write_modules(folder, self.checkpointer.model)
            log_summary(self.cfg, self.checkpointer.model, data_counts(self.cfg))
        hints = lambda: training_hints(self.cfg, last_sizes(model))  # noqa: E731
        with deferring(), actionable_errors("training", folder, hints):
            return super().train()

    def _claim_folder(self, resume: bool) -> None:
        """Lock `OUTPUT_DIR` for this run, unless a command line has done so, or refuse it."""
        if self._is_begun:
            return
        folder = self.cfg.OUTPUT_DIR
        if comm.is_main_process():
            hold(folder, "OUTPUT_DIR")
        if self._old_results and not resume:
            advice = (
                "Call resume_or_load(resume=True) to go on with that run, choose another"
                " OUTPUT_DIR, or remove them"
            )
            refuse_results(folder, self._old_results, advice)

    def _write_config(self) -> None:
        """Write config.yaml, unless it is there by :func:`fpn_plugin.engine.setup.begin`, which
        leaves that of a run to be resumed; that of a finished one stays."""
        resumed = self.start_iter > 0
        finished = resumed and self.start_iter >= self.max_iter
        if comm.is_main_process() and (resumed or not self._is_begun) and not finished:
            write_config(self.cfg, first_weights=resumed and self._is_begun)
        self._is_begun = True

    def _resume(self) -> None:
        resume_run(self.checkpointer, self._trainer.optimizer)
        self.start_iter = self.iter + 1
        if isinstance(self.scheduler, LRMultiplier):  # it has loaded the rates of the checkpoint
            groups = self._trainer.optimizer.param_groups
            self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if self.start_iter >= self.max_iter:
            warn_of_finished(self.checkpointer, self.start_iter, "SOLVER.MAX_ITER", self.max_iter)

    def after_train(self) -> None:
        """Called at the end. A run resumed after its last iteration reports that iteration too."""
        self.iter = min(self.iter, max(self.start_iter, self.max_iter))
        super().after_train()

    def run_step(self) -> None:
        """One iteration.

        Without TorchScript's optimizations on the CPU: they begin after some calls of a function
        (Detectron2's focal loss), so the numbers would depend on how long the process has run.
        """
        with torch.jit.optimized_execution(device_type(self.cfg) != "cpu"):
            super().run_step()

    def _adopt_seed(self, seed: int) -> None:
        logger.warning("SEED is %d, as in the run that goes on, not %d", seed, self.cfg.SEED)
        self.cfg = _with_seed(self.cfg, seed)
        self.checkpointer.record["config"] = plain_config(as_recorded(self.cfg))
        self._trainer.reset_data_loader(self._counted_loader)

    def _counted_loader(self) -> Any:
        loader = self.build_train_loader(self.cfg)
        return CountedLoader(loader, self._skips) if self._skips else loader

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, those that keep metrics.json complete, and that of
        `TEST.VIS_PERIOD`."""
        # without a folder a finished run is evaluated again
        folder = "" if self.cfg.TEST.EXPECTED_RESULTS else self.cfg.OUTPUT_DIR
        hooks = replace_eval_hooks(super().build_hooks(), self._evaluate, folder)
        if comm.is_main_process():
            place = next(i for i, h in enumerate(hooks) if isinstance(h, PeriodicCheckpointer))
            hooks.insert(place, FlushMetrics(self._writers, self.cfg.SOLVER.CHECKPOINT_PERIOD))
        period, folder = self.cfg.TEST.EVAL_PERIOD, self.cfg.OUTPUT_DIR
        place = next((i for i, h in enumerate(hooks) if isinstance(h, EvalHook)), len(hooks))
        hooks.insert(place, CopyHook(folder, self.cfg.SOLVER.CHECKPOINT_PERIOD))
        hooks.insert(0, MissedEvaluation(period, self._evaluate, folder))
        if self.cfg.TEST.VIS_PERIOD > 0 and comm.is_main_process():
            # imported here, as it needs matplotlib
            from fpn_plugin.engine.visualize_hook import build_visualize_hook

            # before the hook of the writers; the checkpointer has the model without DDP
            hook = build_visualize_hook(self.cfg, self.checkpointer.model, self.ema.in_model)
            hooks.insert(-1, hook)
        return hooks

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate now; with `TEST.AUG` at the end only, as in Detectron2's training script."""
        cfg = self.cfg
        if cfg.TEST.AUG.ENABLED and self.iter < self.max_iter:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.TEST.AUG.ENABLED = False
            cfg.freeze()
        with self.ema.in_model():
            share_statistics(self.model)
            self._last_eval_results = self.test(cfg, self.model)
        return self._last_eval_results

    def build_writers(self) -> list[EventWriter]:
        """Called in the main process only."""
        self._writers = build_writers(self.cfg.OUTPUT_DIR, self.max_iter)
        return self._writers

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model, prepared by `MODEL.CHANNELS_LAST`, `FAST_ROI_ALIGN` and `COMPILE`."""
        check_pixels(cfg)
        check_heads_when_built(cfg)
        return prepare_for_training(build_model(cfg), cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `SOLVER.OPTIMIZER`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of `SOLVER.LR_SCHEDULER_NAME`, one of Detectron2's."""
        check_schedule(cfg)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """A loader that can start at any iteration."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader, with errors that name the image.

        Raises:
            ValueError: if the dataset has other classes than the config's model (DATASETS.CLASSES).
        """
        mapper = TestMapper(Mapper(cfg, is_train=False), dataset_name)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        check_test_classes(cfg, dataset_name)
        return InterruptibleLoader(loader)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str = ""
    ) -> DatasetEvaluator:
        """The evaluator of the dataset's `evaluator_type`; see
        :func:`fpn_plugin.evaluation.build.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate in the precision of training (`SOLVER.AMP`), and with `TEST.FOLD_NORMS`.

        Detectron2 evaluates in fp32 whatever it trained in, so its AP of the same weights differs a
        little. For its numbers evaluate with `--eval-only SOLVER.AMP.ENABLED False`.

        With `TEST.AUG.ENABLED` the results with test-time augmentation follow, as "bbox_TTA".

        Args:
            evaluators: by default those of the datasets' `evaluator_type`; with others there is no
                test-time augmentation.

        Raises:
            SaveError, WorkerError, OutOfMemoryError: as in training.
            ValueError: if a dataset has other classes than the model, or Detectron2 cannot augment
                with this model.
        """
        cfg = with_classes_of(model, cfg)
        with actionable_errors("evaluating", cfg.OUTPUT_DIR, lambda: evaluation_hints(cfg)):
            augments = cfg.TEST.AUG.ENABLED and evaluators is None
            if augments:
                check_test_augmentation(cfg)
            model = prepare_for_inference(model, cfg)
            results = super().test(cfg, model, evaluators)
            if not augments:
                return results
            logger.info("Evaluating with test-time augmentation (TEST.AUG)")
            names, folder = cfg.DATASETS.TEST, os.path.join(cfg.OUTPUT_DIR, "inference" + SUFFIX)
            folders = [os.path.join(folder, name) if len(names) > 1 else folder for name in names]
            evaluators = [cls.build_evaluator(cfg, *pair) for pair in zip(names, folders)]
            more = super().test(cfg, augmented(cfg, model), evaluators)
            return {**results, **{key + SUFFIX: value for key, value in more.items()}}


def _with_seed(cfg: CfgNode, seed: int = -1) -> CfgNode:
    """The config with `SEED` set: to `seed` if given, else as it was, else a shared random one."""
    if seed < 0 <= cfg.SEED:
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SEED = seed if seed >= 0 else comm.shared_random_seed()
    if frozen:
        cfg.freeze()
    return cfg
