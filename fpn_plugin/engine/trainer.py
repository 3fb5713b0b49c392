"""Detectron2's DefaultTrainer on any device, with exact resume and atomic checkpoints."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.config.heads import check_heads_when_built
from fpn_plugin.config.validate import plugin_config
from fpn_plugin.engine.data import build_train_loader, start_at
from fpn_plugin.engine.faults.actionable import (
    actionable_errors,
    evaluation_hints,
    training_hints,
)
from fpn_plugin.engine.faults.divergence import last_sizes
from fpn_plugin.engine.faults.skipping import CountedLoader, SkipCounter, TestMapper
from fpn_plugin.engine.hooks import (
    FlushMetrics,
    LossNormalizerHook,
    MissedEvaluation,
    build_writers,
    replace_eval_hooks,
    trim_metrics,
)
from fpn_plugin.engine.rng import SeedHook
from fpn_plugin.engine.step import build_optimizer, build_step_trainer
from fpn_plugin.engine.warm.start import start_warm
from fpn_plugin.evaluation.build import build_evaluator
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.precision import device_type
from fpn_plugin.modeling.speed import prepare_for_inference, prepare_for_training

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer that also runs on the CPU, and resumes exactly.

    A run that was killed and resumed ends with the weights of an unbroken one: bit for bit on the
    CPU, and on a GPU as far as its kernels are deterministic. The statistics of `TEST.PRECISE_BN`
    are an exception, as that hook starts over with its own data.

    Args:
        cfg: Detectron2's keys and this plugin's. A negative `SEED` is replaced by a random one.

    Attributes:
        cfg: the config with the run's seed in it.
    """

    iter: int

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer.__init__ would wrap the model and build a step trainer that need CUDA
        super(DefaultTrainer, self).__init__()
        cfg = plugin_config(cfg)
        self.cfg = cfg = _with_seed(DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        skips = cfg.DATALOADER.ON_ERROR == "skip"
        self._skips = SkipCounter(cfg.OUTPUT_DIR) if skips else None
        data_loader = self._counted_loader()
        # DDP refuses device_ids on the CPU; with None it chooses the device itself
        device_ids = [comm.get_local_rank()] if device_type(cfg) == "cuda" else None
        self._model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        self._trainer = build_step_trainer(cfg, self._model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self._seed_hook = SeedHook(cfg.SEED)
        state_hooks = (self._seed_hook, LossNormalizerHook(model), self._skips)
        self.register_hooks([*state_hooks, *self.build_hooks()])

    @property
    def model(self) -> nn.Module:
        """The model, in DDP if there are several processes, but without autocast."""
        return self._model

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last whole checkpoint in `OUTPUT_DIR`, or else load `MODEL.WEIGHTS`.

        With `MODEL.FPN.WARM_START` the weights are converted for the model's pyramid.

        Raises:
            ValueError: if `OUTPUT_DIR` holds checkpoints of which none is whole.
            RuntimeError: if the processes do not all see the same checkpoint.
        """
        if self.cfg.MODEL.FPN.WARM_START and not (resume and self.checkpointer.has_checkpoint()):
            start_warm(self.checkpointer.model, self.cfg)
        else:
            super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"the processes would start at iterations {starts}: OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR!r} must be the same folder on all machines"
            )
        if self._seed_hook.seed != self.cfg.SEED:
            self._adopt_seed(self._seed_hook.seed)
        start_at(self.data_loader, self.start_iter)
        if resume and comm.is_main_process():
            trim_metrics(self.cfg.OUTPUT_DIR, self.start_iter)

    def train(self) -> Any:
        """Train to the end.

        Returns:
            the results of the last evaluation.

        Raises:
            DivergedError: before a step that would ruin the weights.
            SaveError: if there is no room for a checkpoint or the results of an evaluation.
            WorkerError: if a process that loads data died.
            OutOfMemoryError: with what to lower.
        """
        folder, model = self.cfg.OUTPUT_DIR, self._trainer.model
        hints = lambda: training_hints(self.cfg, last_sizes(model))  # noqa: E731
        with actionable_errors("training", folder, hints):
            return super().train()

    def after_train(self) -> None:
        """Called at the end. A run resumed after its last iteration reports that iteration too."""
        self.iter = min(self.iter, self.max_iter)
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
        self._trainer.reset_data_loader(self._counted_loader)

    def _counted_loader(self) -> Any:
        loader = self.build_train_loader(self.cfg)
        return CountedLoader(loader, self._skips) if self._skips else loader

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, those that keep metrics.json complete, and that of
        `TEST.VIS_PERIOD`."""
        hooks = replace_eval_hooks(super().build_hooks())
        if comm.is_main_process():
            place = next(i for i, h in enumerate(hooks) if isinstance(h, PeriodicCheckpointer))
            hooks.insert(place, FlushMetrics(self._writers, self.cfg.SOLVER.CHECKPOINT_PERIOD))
        evaluate = lambda: self.test(self.cfg, self.model)  # noqa: E731
        hooks.insert(0, MissedEvaluation(self.cfg.TEST.EVAL_PERIOD, evaluate, self.cfg.OUTPUT_DIR))
        if self.cfg.TEST.VIS_PERIOD > 0 and comm.is_main_process():
            # imported here, as it needs matplotlib
            from fpn_plugin.engine.visualize_hook import build_visualize_hook

            # before the hook of the writers; the checkpointer has the model without DDP
            hooks.insert(-1, build_visualize_hook(self.cfg, self.checkpointer.model))
        return hooks

    def build_writers(self) -> list[EventWriter]:
        """Called in the main process only."""
        self._writers = build_writers(self.cfg.OUTPUT_DIR, self.max_iter)
        return self._writers

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model, prepared by `MODEL.CHANNELS_LAST`, `FAST_ROI_ALIGN` and `COMPILE`."""
        check_heads_when_built(cfg)
        model = build_model(cfg)
        logging.getLogger("detectron2.engine.defaults").info("Model:\n%s", model)
        return prepare_for_training(model, cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `SOLVER.OPTIMIZER`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """A loader that can start at any iteration."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader, with errors that name the image."""
        mapper = TestMapper(DatasetMapper(cfg, is_train=False), dataset_name)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of the dataset's `evaluator_type`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate in the precision of training (`SOLVER.AMP`), and with `TEST.FOLD_NORMS`.

        Detectron2 evaluates in fp32 whatever it trained in, so its AP of the same weights differs a
        little. For its numbers evaluate with `--eval-only SOLVER.AMP.ENABLED False`.

        Raises:
            SaveError, WorkerError, OutOfMemoryError: as in training.
        """
        with actionable_errors("evaluating", cfg.OUTPUT_DIR, lambda: evaluation_hints(cfg)):
            return super().test(cfg, prepare_for_inference(model, cfg), evaluators)


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
