"""A run's metrics.json: complete and without repetitions, also after the run was killed."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)

from fpn_plugin.engine.run_record import METRICS, RESULT_KEY, metric_lines

logger = logging.getLogger(__name__)

_WINDOW = 20  # values of a loss whose median is written, as in Detectron2


class MetricsWriter(EventWriter):
    """Detectron2's JSONWriter that can be asked to write several times in one iteration.

    What was measured later in an iteration (the evaluation's results) becomes a line of its own.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "a")
        self._written: dict[str, int] = {}

    def write(self) -> None:
        """Append what is new, one line for each iteration, and bring it to the disk."""
        fresh: dict[int, dict[str, Any]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(_WINDOW)
        for name, (value, iteration) in latest.items():
            if self._written.get(name, -1) < iteration:
                self._written[name] = iteration
                fresh[iteration][name] = value
        for iteration in sorted(fresh):
            if fresh[iteration].keys() != {"eta_seconds"}:  # the printer adds it to what stands
                line = {**fresh[iteration], "iteration": iteration}
                self._file.write(json.dumps(line, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class PatientWriter(EventWriter):
    """Goes on when a writer cannot write: what is trained is worth more than its curves.

    Each failure is logged as an error. Lines of metrics.json wait in memory and are written as soon
    as there is room again.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer

    def write(self) -> None:
        """As the writer does."""
        self._attempt(self.writer.write)

    def close(self) -> None:
        """As the writer does."""
        self._attempt(self.writer.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            name = type(self.writer).__name__
            logger.error("%s could not write (%s); the run goes on without", name, error)
            storage = get_event_storage()
            storage.clear_images()  # they would pile up
            storage.clear_histograms()


class FlushMetrics(HookBase):
    """Writes metrics.json before a checkpoint: a run that goes on from there lacks no line.

    Args:
        writers: of :func:`build_writers`.
        period: `SOLVER.CHECKPOINT_PERIOD`.
    """

    def __init__(self, writers: list[EventWriter], period: int) -> None:
        self._writers = [w for w in writers if isinstance(getattr(w, "writer", w), MetricsWriter)]
        self._period = period

    def after_step(self) -> None:
        """Called by the trainer after each iteration, before the checkpoint's hook."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            for writer in self._writers:
                writer.write()


class MissedEvaluation(EvalHook):
    """The evaluation of the checkpoint that a run goes on from, if it was due and not finished.

    Evaluations in the middle of training; that at its end is made by Detectron2's hook.

    Args:
        period: `TEST.EVAL_PERIOD`.
        evaluate: gives the results.
        folder: whose metrics.json tells what was finished.
    """

    def __init__(self, period: int, evaluate: Callable[[], Any], folder: str) -> None:
        super().__init__(period, evaluate, eval_after_train=False)
        self._folder = folder

    def before_train(self) -> None:
        """Called by the trainer at the start."""
        start = self.trainer.start_iter
        due = self._period > 0 and 0 < start < self.trainer.max_iter and start % self._period == 0
        if due and not comm.all_gather(_has_results(self._folder, start - 1))[0]:
            logger.info("The evaluation after iteration %d was not finished: again", start - 1)
            self.trainer.storage.iter = start - 1
            self._do_eval()
            self.trainer.storage.iter = start

    def after_step(self) -> None:
        """Nothing: that is the other hook's."""


def trim_metrics(folder: str, start: int) -> None:
    """Remove from metrics.json what a run that goes on will write again, and half a last line.

    For the main process. The file may be open for appending.

    Args:
        start: the first iteration to come.
    """
    path = Path(folder, METRICS)
    if not path.is_file():
        return
    kept = [line for line in metric_lines(folder) if line.get("iteration", -1) < start]
    content = "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept).encode()
    before = path.read_bytes()
    common = len(os.path.commonprefix([before, content]))
    if common == len(before):
        return
    logger.info("%s: lines from iteration %d on are removed, they come again", path, start)
    os.truncate(path, common)  # not replaced: the writer holds it open
    with open(path, "ab") as file:
        file.write(content[common:])


def build_writers(folder: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers for a terminal, metrics.json and TensorBoard; patient."""
    os.makedirs(folder, exist_ok=True)
    metrics = MetricsWriter(os.path.join(folder, METRICS))
    chosen = (CommonMetricPrinter(max_iter), metrics, TensorboardXWriter(folder))
    return [PatientWriter(writer) for writer in chosen]


def _has_results(folder: str, iteration: int) -> bool:
    lines = [line for line in metric_lines(folder) if line.get("iteration") == iteration]
    return any(RESULT_KEY.search(key) for line in lines for key in line)
