"""Hooks and writers of a training run.

They keep metrics.json complete and without repetitions, also where the run is killed and resumed,
evaluate what was missed, the same model on all processes, and put what a dense detector counts into
the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable

import torch.distributed as dist
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn_plugin.checkpoint.run_folder import METRICS, RESULT_KEY, metric_lines
from fpn_plugin.engine.interrupt import EvaluationLeft, interrupted_when_left

logger = logging.getLogger(__name__)

_WINDOW = 20  # iterations of a loss whose median is written, as in Detectron2


class MetricsWriter(EventWriter):
    """Detectron2's JSONWriter, but it may be called several times in one iteration.

    What is measured later in an iteration (the results of an evaluation) becomes another line.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "a")
        self._written: dict[str, int] = {}

    def write(self) -> None:
        """Append what is new, a line per iteration, and sync the file to the disk."""
        fresh: dict[int, dict[str, Any]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(_WINDOW)
        for name, (value, iteration) in latest.items():
            if self._written.get(name, -1) < iteration:
                self._written[name] = iteration
                fresh[iteration][name] = value
        for iteration in sorted(fresh):
            # CommonMetricPrinter adds the ETA after the iteration's line was written
            if fresh[iteration].keys() != {"eta_seconds"}:
                line = {**fresh[iteration], "iteration": iteration}
                self._file.write(json.dumps(line, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TolerantWriter(EventWriter):
    """Lets the run go on when a writer cannot write: the weights are worth more than the curves.

    Each failure is logged as an error. Lines of metrics.json are kept in memory and written as soon
    as there is room again.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer

    def write(self) -> None:
        """Write, or log why not."""
        self._attempt(self.writer.write)

    def close(self) -> None:
        """Close, or log why not."""
        self._attempt(self.writer.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            name = type(self.writer).__name__
            logger.error("%s could not write (%s); the run goes on without", name, error)
            storage = get_event_storage()
            storage.clear_images()  # they would accumulate
            storage.clear_histograms()


def build_writers(folder: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers for the terminal, metrics.json and TensorBoard, each tolerant."""
    os.makedirs(folder, exist_ok=True)
    metrics = MetricsWriter(os.path.join(folder, METRICS))
    writers = (CommonMetricPrinter(max_iter), metrics, TensorboardXWriter(folder))
    return [TolerantWriter(writer) for writer in writers]


def trim_metrics(folder: str, start: int, end: int) -> None:
    """Remove from metrics.json what the resumed run will write again, and an incomplete last line.

    For the main process only. The file may be open for appending.

    Args:
        start: the first iteration to come.
        end: the one after the last; nothing comes again if it is not after `start`.
    """
    path = Path(folder, METRICS)
    if not path.is_file():
        return
    lines = metric_lines(folder)
    kept = [line for line in lines if line.get("iteration", -1) < start or start >= end]
    content = "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept).encode()
    before = path.read_bytes()
    common = len(os.path.commonprefix([before, content]))
    if common == len(before):
        return
    logger.info("%s: lines from iteration %d on are removed, they come again", path, start)
    os.truncate(path, common)  # not replaced, as the writer has it open
    with open(path, "ab") as file:
        file.write(content[common:])


def is_checkpoint_due(trainer: TrainerBase, period: int) -> bool:
    """Whether a trainer saves a checkpoint after its present iteration.

    Args:
        period: `SOLVER.CHECKPOINT_PERIOD`.
    """
    done = trainer.iter + 1
    return done % period == 0 or done >= trainer.max_iter


class FlushMetrics(HookBase):
    """Writes metrics.json before each checkpoint, so that a run resumed from it lacks no line.

    Args:
        writers: of :func:`build_writers`.
        period: `SOLVER.CHECKPOINT_PERIOD`.
    """

    def __init__(self, writers: list[EventWriter], period: int) -> None:
        self._writers = [w for w in writers if isinstance(getattr(w, "writer", w), MetricsWriter)]
        self._period = period

    def after_step(self) -> None:
        """Called by the trainer after each iteration, before the checkpoint's hook."""
        if is_checkpoint_due(self.trainer, self._period):
            for writer in self._writers:
                writer.write()


class EvalHook(hooks.EvalHook):
    """Detectron2's, but a run that fails in its last iteration is not evaluated.

    Detectron2 evaluates even then, and waits for all processes, some of which may be gone. Nor is a
    finished run that is resumed, if its results are there.

    Args:
        period: `TEST.EVAL_PERIOD`.
        evaluate: gives the results.
        folder: the run's; "" evaluates a finished run again.
    """

    def __init__(self, period: int, evaluate: Callable[[], Any], folder: str = "") -> None:
        super().__init__(period, evaluate)
        self._folder = folder

    def after_step(self) -> None:
        """Called by the trainer after each iteration. The last hook ends a run that was told to end
        during an evaluation."""
        with contextlib.suppress(EvaluationLeft):
            super().after_step()

    def after_train(self) -> None:
        """Called by the trainer after the last iteration, or after an error.

        Raises:
            Interrupted: if a signal came during the evaluation.
        """
        start, end = self.trainer.start_iter, self.trainer.max_iter
        if self.trainer.iter < end:
            return
        is_old = start >= end and bool(self._folder)
        if is_old and comm.all_gather(_has_results(self._folder, start - 1))[0]:
            logger.info(
                "The results are in %s; --eval-only --resume evaluates again",
                os.path.join(self._folder, METRICS),
            )
            return
        with interrupted_when_left():
            super().after_train()


def replace_eval_hooks(
    given: list[HookBase | None], evaluate: Callable[[], Any], folder: str
) -> list[HookBase | None]:
    """Hooks with Detectron2's EvalHook replaced by an :class:`EvalHook` of that function, for a
    run's folder."""
    return [
        EvalHook(hook._period, evaluate, folder) if hook and type(hook) is hooks.EvalHook else hook
        for hook in given
    ]


def _has_results(folder: str, first: int, last: float = math.inf) -> bool:
    """Whether a run's metrics.json has results of an evaluation in iterations from `first` on."""
    lines = [x for x in metric_lines(folder) if first <= x.get("iteration", -1) <= last]
    return any(RESULT_KEY.search(name) for line in lines for name in line)


class MissedEvaluation(hooks.EvalHook):
    """Evaluates the checkpoint that a run is resumed from, if the run was killed before it could.

    For the evaluations during training; the one at the end is :class:`EvalHook`'s.

    Args:
        period: `TEST.EVAL_PERIOD`.
        evaluate: gives the results.
        folder: the run's; its metrics.json shows which evaluations were finished.
    """

    def __init__(self, period: int, evaluate: Callable[[], Any], folder: str) -> None:
        super().__init__(period, evaluate, eval_after_train=False)
        self._folder = folder

    def before_train(self) -> None:
        """Called by the trainer at the start.

        Raises:
            Interrupted: if a signal came during the evaluation.
        """
        start = self.trainer.start_iter
        due = self._period > 0 and 0 < start < self.trainer.max_iter and start % self._period == 0
        if due and not comm.all_gather(_has_results(self._folder, start - 1, start - 1))[0]:
            logger.info("The evaluation after iteration %d was not finished: again", start - 1)
            self.trainer.storage.iter = start - 1
            with interrupted_when_left():
                self._do_eval()
            self.trainer.storage.iter = start

    def after_step(self) -> None:
        """Nothing: evaluations that are due are :class:`EvalHook`'s."""


class LossNormalizerHook(HookBase):
    """Keeps a dense detector's running number of positives in the checkpoint.

    In Detectron2's `DenseDetector` it is a plain attribute and no part of the state dict, but an
    exact resume of RetinaNet and FCOS needs it. Each process has its own, of its part of the batch.

    Args:
        model: the model itself, not a wrapper.
        period: `SOLVER.CHECKPOINT_PERIOD`.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        self.model = model
        self._period = period
        self._gathered: tuple[int, list[float]] = (-1, [])  # the iteration, those of all processes

    def after_step(self) -> None:
        """Called by the trainer after each iteration, before the checkpoint's hook."""
        if is_checkpoint_due(self.trainer, self._period):
            self.gather()

    def gather(self) -> None:
        """Fetch the numbers of all processes, for a checkpoint that is saved in this iteration."""
        value = getattr(self.model, "loss_normalizer", None)
        if value is not None:
            self._gathered = (self.trainer.iter, comm.all_gather(float(value)))

    def state_dict(self) -> dict[str, Any]:
        """This process's number, and those of all; nothing for a model without it."""
        value = getattr(self.model, "loss_normalizer", None)
        if value is None:
            return {}
        iteration, values = self._gathered
        is_fresh = iteration == self.trainer.iter
        return {"loss_normalizer": value, **({"loss_normalizers": values} if is_fresh else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the checkpoint: this process's number or, if there were more or fewer
        processes, an equal share of all."""
        values, processes = state.get("loss_normalizers", []), comm.get_world_size()
        if len(values) == processes:
            self.model.loss_normalizer = values[comm.get_rank()]
        elif values:
            self.model.loss_normalizer = sum(values) / processes
        else:  # of a version that did not gather them
            self.model.loss_normalizer = state["loss_normalizer"]


def share_statistics(model: nn.Module) -> None:
    """Give all processes the running statistics of rank 0's batch norms, which the checkpoints
    hold, before they evaluate together.

    Each process has gathered those of its own images, so that an evaluation over processes would
    be one of several models.
    """
    if comm.get_world_size() < 2:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for statistic in module.buffers(recurse=False):
                dist.broadcast(statistic, 0)
