"""A training run seen from outside: its progress line, and its results as a table."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from typing import Mapping

from tabulate import tabulate

# what Detectron2's CommonMetricPrinter writes every 20 iterations, and its evaluator's progress
_STEP = re.compile(r"eta: (?P<eta>\S+)\s+iter: (?P<iter>\d+)\s.*?total_loss: (?P<loss>\S+)")
_EVAL = re.compile(r"Inference done (?P<done>\d+)/(?P<all>\d+).*ETA=(?P<eta>\S+)")
_WARNING = re.compile(r"\bWARNING\b|\bERROR\b")
_METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP small (< 32² px)",
    "APm": "AP medium",
    "APl": "AP large (> 96² px)",
}


def progress_text(line: str) -> str | None:
    """What a line of Detectron2's log says of the progress, or None."""
    if step := _STEP.search(line):
        return f"iteration {int(step['iter']) + 1}, loss {step['loss']}, ETA {step['eta']}"
    if done := _EVAL.search(line):
        return f"evaluated {done['done']} of {done['all']} images, ETA {done['eta']}"
    return None


def follow(process: subprocess.Popen[str]) -> None:
    """Show the progress and the warnings of a training run until it ends.

    On a terminal the progress stays on one line.

    Raises:
        RuntimeError: with the end of its output, if the run fails.
    """
    tail: deque[str] = deque(maxlen=30)
    ending = "\r" if sys.stdout.isatty() else "\n"
    assert process.stdout is not None, "follow() needs stdout=subprocess.PIPE"
    for line in process.stdout:
        tail.append(line)
        if text := progress_text(line):
            print(f"  {text:<70}", end=ending, flush=True)
        elif _WARNING.search(line):
            print(f"  {line.rstrip()}", flush=True)
    if process.wait():
        raise RuntimeError(f"the run ended with exit code {process.returncode}:\n{''.join(tail)}")
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
