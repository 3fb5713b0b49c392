"""A training run seen from outside: its progress line, and its results as a table."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from typing import Callable, Mapping

from tabulate import tabulate

# what Detectron2's CommonMetricPrinter writes every 20 iterations, and its evaluator's progress
_TIME = r"(?P<eta>(?:\d+ days?, )?[\d:]+)"
_STEP = re.compile(rf"eta: {_TIME}\s+iter: (?P<iter>\d+)\s.*?total_loss: (?P<loss>\S+)")
_EVAL = re.compile(rf"Inference done (?P<done>\d+)/(?P<all>\d+).*ETA={_TIME}")
_WARNING = re.compile(r"\bWARNING\b|\bERROR\b")
_METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP small (< 32² px)",
    "APm": "AP medium",
    "APl": "AP large (> 96² px)",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: iterations of the training, or images of an evaluation.
        total: images of the evaluation; 0 while it trains, whose log does not tell.
        eta: of the training or the evaluation, as the log has it.
        loss: of the training.
    """

    done: int
    total: int
    eta: str
    loss: str = ""

    @property
    def seconds_left(self) -> float:
        """`eta` in seconds."""
        days, _, clock = self.eta.rpartition(", ")
        parts = [int(part) for part in clock.split(":")]
        seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
        return seconds + 86400 * int(days.partition(" ")[0] or 0)


def read_progress(line: str) -> Progress | None:
    """What a line of Detectron2's log says of the progress, or None."""
    if step := _STEP.search(line):
        return Progress(int(step["iter"]) + 1, 0, step["eta"], step["loss"])
    if done := _EVAL.search(line):
        return Progress(int(done["done"]), int(done["all"]), done["eta"])
    return None


def progress_text(line: str) -> str | None:
    """The same as text."""
    progress = read_progress(line)
    if progress is None:
        return None
    if progress.total:
        return f"evaluated {progress.done} of {progress.total} images, ETA {progress.eta}"
    return f"iteration {progress.done}, loss {progress.loss}, ETA {progress.eta}"


def watch(process: subprocess.Popen[str], see: Callable[[str], None]) -> None:
    """Hand the lines of a run to `see` until it ends.

    Raises:
        RuntimeError: with the end of its output, if the run fails.
    """
    tail: deque[str] = deque(maxlen=30)
    assert process.stdout is not None, "watch() needs stdout=subprocess.PIPE"
    for line in process.stdout:
        tail.append(line)
        see(line)
    if process.wait():
        raise RuntimeError(f"the run ended with exit code {process.returncode}:\n{''.join(tail)}")


def follow(process: subprocess.Popen[str]) -> None:
    """Show the progress and the warnings of a training run until it ends.

    On a terminal the progress stays on one line.

    Raises:
        RuntimeError: with the end of its output, if the run fails.
    """
    ending = "\r" if sys.stdout.isatty() else "\n"

    def see(line: str) -> None:
        if text := progress_text(line):
            print(f"  {text:<70}", end=ending, flush=True)
        elif _WARNING.search(line):
            print(f"  {line.rstrip()}", flush=True)

    watch(process, see)
    print(f"  {'finished':<70}", flush=True)


def summary(metrics: Mapping[str, float]) -> str:
    """The AP of the last evaluation as a table, a row for boxes and one for masks if there are any.

    Args:
        metrics: the last line of a run's metrics.json.

    Raises:
        ValueError: if it holds no AP.
    """
    rows = []
    for task, name in (("bbox", "boxes"), ("segm", "masks")):
        if f"{task}/AP" in metrics:
            values = [metrics.get(f"{task}/{metric}", float("nan")) for metric in _METRICS]
            rows.append([name, *(f"{value:.1f}" for value in values)])
    if not rows:
        raise ValueError(f"no AP among the metrics {', '.join(sorted(metrics)[:10])}")
    return tabulate(rows, headers=["", *_METRICS.values()], disable_numparse=True)
