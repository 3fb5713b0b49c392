"""What is told of each run and each config."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import numpy as np

from fpn_plugin.analysis.compare.groups import Group
from fpn_plugin.analysis.compare.runs import Run
from fpn_plugin.analysis.compare.scores import Scores


def metrics_of(run: Run, scores: Scores) -> dict[str, float]:
    """By the detections where they are, or else by metrics.json."""
    found = dict(run.metrics)
    for task, of in scores.get(run.name, {}).items():
        found = {key: found[key] for key in found if not key.startswith(f"{task}/")}
        found.update({f"{task}/{name}": value for name, value in of.metrics.items()})
    return found


def run_facts(run: Run, group: Group, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What is told of a run; "metrics" are in percent.

    Args:
        metrics: of every run, by its name.
    """
    return {
        "name": run.name,
        "folder": str(run.folder),
        "group": group.name,
        "seed": run.seed,
        "iteration": run.iteration,
        "metrics": metrics[run.name],
    }


def group_facts(group: Group, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What is told of a config: "metrics" with the "mean" and the "spread" of its runs, in percent.

    Args:
        metrics: of every run, by its name.
    """
    keys = dict.fromkeys(key for run in group.runs for key in metrics[run.name])
    values = {key: [metrics[run.name].get(key, math.nan) for run in group.runs] for key in keys}
    return {
        "name": group.name,
        "runs": [run.name for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        "metrics": {key: _statistics(of) for key, of in values.items()},
    }


def _statistics(values: Sequence[float]) -> dict[str, float]:
    """The mean, and the standard deviation where there are several; nan if one is missing.

    A mean without a run that detected nothing would be too good.
    """
    return {
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
    }


def curves_of(run: Run) -> dict[str, Any]:
    """Pairs of iteration and value: "loss", and by task "AP" in percent."""
    return {
        "loss": sorted(run.losses.items()),
        "AP": {task: sorted(of.items()) for task, of in run.curves.items()},
    }
