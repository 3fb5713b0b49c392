"""Compares runs: from their folders to a report.

The report is one dictionary, ready for JSON but for nan: "groups" and "runs" with their metrics,
"pairs" of configs with the bootstrap's intervals, "differences" of the configs, "curves", "notes".
"""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO

from fpn_plugin.benchmark.report import check_folder
from fpn_plugin.compare.costs import (
    SIZE,
    Latencies,
    count_costs,
    model_key,
    read_latencies,
)
from fpn_plugin.compare.report import JSON, terminal_text, write_comparison
from fpn_plugin.compare.runs import (
    TASKS,
    Group,
    Run,
    config_differences,
    count_seeds,
    find_group,
    group_runs,
    read_runs,
)
from fpn_plugin.compare.scores import Scores, compare_pairs, score_runs
from fpn_plugin.compare.tables import summarise
from fpn_plugin.evaluation.bootstrap import MIN_IMAGES
from fpn_plugin.evaluation.scores import load_truth, support_of
from fpn_plugin.evaluation.size_bins import bin_names, check_edges, count_objects
from fpn_plugin.report.progress import Bar

SCHEMA = 4
"""1: "told" for "significant", and losses among the curves. 2: no "verdict" in the pairs, whose
intervals were given for any number of images; no "support" of the metrics. 3: no "over" in the
pairs, whose intervals were over images alone."""


def compare(
    folders: Sequence[str],
    report: str,
    *,
    benchmark: str = "",
    size_bins: Sequence[float] = (),
    baseline: str = "",
    resamples: int = 1000,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Compare runs; write JSON, CSV, Markdown, pictures and one HTML page, and print the tables.

    Args:
        folders: OUTPUT_DIRs, those of evaluations (`eval-1`) too.
        report: a folder for the files.
        benchmark: report.json of `fpn benchmark`, for latencies; "" for none.
        size_bins: sides in pixels between finer size bins.
        baseline: the name of a config, or a run's folder; "" for the first run's config.
        resamples: draws of the bootstrap.
        overwrite: replace the comparison that the folder holds.
        quiet: print nothing.

    Returns:
        the HTML page.

    Raises:
        FileNotFoundError: for a folder that holds no run, or a benchmark that does not exist.
        FileExistsError: if the folder holds a comparison, unless `overwrite`.
        ValueError: naming the option or folders: nothing is evaluated, other test sets, …
    """
    check_folder(report, overwrite, JSON, "a comparison")
    if resamples < 1:
        raise ValueError(f"--resamples {resamples} is not a whole number of 1 or more")
    edges = check_edges(list(size_bins), "--size-bins")
    content = _build_report(read_runs(folders), benchmark, edges, baseline, resamples, Bar(quiet))
    page = write_comparison(content, report)
    if not quiet:
        print(terminal_text(content))
    return page


def _build_report(
    runs: Sequence[Run],
    benchmark: str,
    edges: Sequence[float],
    baseline: str,
    resamples: int,
    bar: Bar,
) -> dict[str, Any]:
    evaluated = [run for run in runs if run.is_evaluated]
    if not evaluated:
        names = ", ".join(str(run.folder) for run in runs)
        raise ValueError(f"none of the runs has been evaluated yet: {names}")
    groups = group_runs(evaluated)
    first = find_group(baseline, groups) if baseline else groups[0]
    latency = read_latencies(benchmark, groups) if benchmark else None
    report = _head(runs, groups)
    report.update({"baseline": first.name, "resamples": resamples})
    truth = load_truth(evaluated[0].dataset, evaluated[0].truth)
    scores: Scores = {}
    if isinstance(truth, COCO):
        images = truth.getImgIds()
        objects = dict(zip(bin_names(edges), count_objects(truth, images, edges)))
        support = {key: value._asdict() for key, value in support_of(truth, edges).items()}
        report.update({"images": len(images), "objects": objects, "support": support})
        scores = score_runs(evaluated, truth, edges, report["notes"], bar)
    else:
        report["notes"].append(f"No bootstrap, and AP from metrics.json alone: {truth}.")
    _add_metrics(report, groups, scores)
    if not report["tasks"]:
        raise ValueError(f"none of the runs has an AP: {', '.join(run.name for run in evaluated)}")
    if isinstance(truth, COCO):
        report["pairs"] = compare_pairs(groups, scores, report, bar)
    if report["pairs"] and report["images"] < MIN_IMAGES:
        report["notes"].append(
            f"{report['images']} test images are too few to say which config is better:"
            f" {MIN_IMAGES} are needed in which one of them finds something."
        )
    _add_costs(report, groups, latency, bar)
    report["summary"] = summarise(report)
    bar.end()
    return report


def _head(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """What is known before anything is evaluated, in the order of the JSON file."""
    evaluated = [run for group in groups for run in group.runs]
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "summary": "",
        "dataset": evaluated[0].dataset,
        "images": None,
        "objects": {},
        "support": {},
        "size": list(SIZE),
        "latency": "",
        "differences": config_differences([group.runs for group in groups]),
        "pairs": {},
        "curves": {
            run.name: {"AP": {task: sorted(curve.items()) for task, curve in run.curves.items()}}
            for run in evaluated
        },
        "unfinished": [str(run.folder) for run in runs if not run.is_evaluated],
        "notes": _notes_on_runs(groups),
    }


def _notes_on_runs(groups: Sequence[Group]) -> list[str]:
    """What a reader should know of the runs before believing the numbers."""
    notes = []
    if len({group.runs[0].is_python for group in groups}) > 1:
        notes.append(
            "Some runs are of YAML and some of Python configs: of their keys only those are"
            " compared that both have. Keys of optimizer, lr_multiplier and the heads may differ."
        )
    for group in groups:
        for seed, count in count_seeds(group.runs).items():
            if count > 1:
                notes.append(f"{group.name}: {count} runs have the same seed, {seed}.")
        for run in group.runs:
            if 0 <= run.iteration < run.max_iterations:
                notes.append(
                    f"{run.name}: its last evaluation was at iteration {run.iteration} of"
                    f" {run.max_iterations}."
                )
            if len(run.config["DATASETS.TEST"]) > 1:
                notes.append(f"{run.name}: of its test sets only {run.dataset} is compared.")
    return notes


def _add_metrics(report: dict[str, Any], groups: Sequence[Group], scores: Scores) -> None:
    """Add the tasks, and the metrics in percent of each run and group."""
    metrics = {run.name: _run_metrics(run, scores) for group in groups for run in group.runs}
    report["tasks"] = [
        task for task in TASKS if any(f"{task}/AP" in values for values in metrics.values())
    ]
    report["runs"] = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "group": group.name,
            "seed": run.seed,
            "iteration": run.iteration,
            "metrics": metrics[run.name],
        }
        for group in groups
        for run in group.runs
    ]
    report["groups"] = [
        {
            "name": group.name,
            "runs": [run.name for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "metrics": _mean_and_spread([metrics[run.name] for run in group.runs]),
        }
        for group in groups
    ]


def _run_metrics(run: Run, scores: Scores) -> dict[str, float]:
    """From the detections of the tasks that have some, else from metrics.json."""
    metrics = dict(run.metrics)
    for task, score in scores.get(run.name, {}).items():
        metrics = {key: metrics[key] for key in metrics if not key.startswith(f"{task}/")}
        metrics.update({f"{task}/{name}": value for name, value in score.metrics.items()})
    return metrics


def _mean_and_spread(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By metric, the mean and the standard deviation of several runs; nan if one is missing.

    A mean without a run that detected nothing would be too good.
    """
    keys = dict.fromkeys(key for metrics in runs for key in metrics)
    values = {key: [metrics.get(key, math.nan) for metrics in runs] for key in keys}
    return {
        key: {
            "mean": float(np.mean(column)),
            "spread": float(np.std(column, ddof=1)) if len(column) > 1 else math.nan,
        }
        for key, column in values.items()
    }


def _add_costs(
    report: dict[str, Any], groups: Sequence[Group], latency: Latencies | None, bar: Bar
) -> None:
    """Add the parameters, GFLOPs and seconds of each group; equal models are counted once."""
    costs: dict[str, dict[str, float]] = {}
    bar.begin("parameters and operations", len(groups))
    for done, (entry, group) in enumerate(zip(report["groups"], groups, strict=True), 1):
        try:
            model = model_key(group)
            if model not in costs:
                costs[model] = count_costs(group)
            entry.update(costs[model])
        except Exception as error:  # whatever a config of another version lacks becomes a note
            report["notes"].append(
                f"{group.name}: its model cannot be built here to be counted:"
                f" {type(error).__name__}: {error}"
            )
        bar.step(done)
    if latency:
        report["latency"] = latency.what
        report["notes"] += latency.notes
        for entry in report["groups"]:
            entry["seconds"] = latency.seconds.get(entry["name"])
