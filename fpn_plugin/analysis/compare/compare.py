"""Runs compared: from their folders to a report."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Sequence

from fpn_plugin.analysis.benchmark.report import check_folder
from fpn_plugin.analysis.compare.costs import SIZE, Latencies, counts, latencies, model_key
from fpn_plugin.analysis.compare.facts import curves_of, group_facts, metrics_of, run_facts
from fpn_plugin.analysis.compare.groups import (
    Group,
    config_differences,
    find_group,
    group_runs,
    seeds,
)
from fpn_plugin.analysis.compare.pairs import compare_pairs
from fpn_plugin.analysis.compare.runs import TASKS, Run, read_runs
from fpn_plugin.analysis.compare.scores import Scores, Truth, load_truth, score_runs
from fpn_plugin.analysis.compare.summary import summarise
from fpn_plugin.analysis.compare.write import JSON, terminal_text, write_comparison
from fpn_plugin.analysis.report.bar import Bar
from fpn_plugin.engine.size_bins import check_edges

SCHEMA = 1
_FEW = 30  # images from which on a bootstrap's percentiles are about right


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
        benchmark: report.json of tools/benchmark.py, for latencies; "" for none.
        size_bins: sides in pixels between finer size bins.
        baseline: the name of a config, or a run's folder; "" for the first run's config.
        resamples: draws of the bootstrap.
        overwrite: replace the comparison that the folder holds.
        quiet: print nothing.

    Returns:
        the HTML page.

    Raises:
        FileNotFoundError: for a folder that is no run's, or a benchmark that is not there.
        FileExistsError: if the folder holds a comparison, unless `overwrite`.
        ValueError: naming the option or folders: nothing is evaluated, other test sets, …
    """
    check_folder(report, overwrite, JSON, "a comparison")
    if resamples < 1:
        raise ValueError(f"--resamples {resamples} is not a whole number of 1 or more")
    edges = check_edges(list(size_bins), "--size-bins")
    found = _comparison(read_runs(folders), benchmark, edges, baseline, resamples, Bar(quiet))
    page = write_comparison(found, report)
    if not quiet:
        print(terminal_text(found))
    return page


def _comparison(
    runs: Sequence[Run],
    benchmark: str,
    edges: Sequence[float],
    baseline: str,
    resamples: int,
    bar: Bar,
) -> dict[str, Any]:
    """Everything that the report tells, ready for JSON but for numbers that are none."""
    finished = [run for run in runs if run.is_evaluated]
    if not finished:
        names = ", ".join(str(run.folder) for run in runs)
        raise ValueError(f"none of the runs has been evaluated yet: {names}")
    groups = group_runs(finished)
    first = find_group(baseline, groups) if baseline else groups[0]
    latency = latencies(benchmark, groups) if benchmark else None
    report = _head(runs, groups)
    report.update({"baseline": first.name, "resamples": resamples})
    truth = load_truth(finished[0])
    scores: Scores = {}
    if isinstance(truth, Truth):
        report.update({"images": len(truth.images), "objects": truth.objects(edges)})
        scores = score_runs(finished, truth, edges, report["notes"], bar)
    else:
        report["notes"].append(f"No bootstrap, and AP from metrics.json alone: {truth}.")
    _add_metrics(report, groups, scores)
    if not report["tasks"]:
        raise ValueError(f"none of the runs has an AP: {', '.join(run.name for run in finished)}")
    if isinstance(truth, Truth):
        report["pairs"] = compare_pairs(groups, scores, report, bar)
    if report["pairs"] and report["images"] < _FEW:
        report["notes"].append(
            f"{report['images']} test images are few: intervals over so few come out too narrow,"
            " and other images may say otherwise."
        )
    _add_costs(report, groups, latency, bar)
    report["summary"] = summarise(report)
    bar.end()
    return report


def _head(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    finished = [run for group in groups for run in group.runs]
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "summary": "",
        "dataset": finished[0].dataset,
        "images": None,
        "objects": {},
        "size": list(SIZE),
        "latency": "",
        "differences": config_differences(groups),
        "pairs": {},
        "curves": {run.name: curves_of(run) for run in finished},
        "unfinished": [str(run.folder) for run in runs if not run.is_evaluated],
        "notes": _notes_on(groups),
    }


def _add_metrics(report: dict[str, Any], groups: Sequence[Group], scores: Scores) -> None:
    metrics = {run.name: metrics_of(run, scores) for group in groups for run in group.runs}
    report["tasks"] = [task for task in TASKS if any(f"{task}/AP" in of for of in metrics.values())]
    report["runs"] = [run_facts(run, group, metrics) for group in groups for run in group.runs]
    report["groups"] = [group_facts(group, metrics) for group in groups]


def _notes_on(groups: Sequence[Group]) -> list[str]:
    """What one should know of the runs before one believes the numbers."""
    notes = []
    for group in groups:
        for seed, times in seeds(group.runs).items():
            if times > 1:
                notes.append(f"{group.name}: {times} runs have the same seed, {seed}.")
        for run in group.runs:
            if 0 <= run.iteration < run.planned:
                notes.append(
                    f"{run.name}: its last evaluation was at iteration {run.iteration} of"
                    f" {run.planned}."
                )
            if len(run.config["DATASETS.TEST"]) > 1:
                notes.append(f"{run.name}: of its test sets only {run.dataset} is compared.")
    return notes


def _add_costs(
    report: dict[str, Any], groups: Sequence[Group], latency: Latencies | None, bar: Bar
) -> None:
    known: dict[str, dict[str, float]] = {}
    bar.begin("parameters and operations", len(groups))
    for done, (facts, group) in enumerate(zip(report["groups"], groups, strict=True), 1):
        try:
            model = model_key(group)
            known[model] = known[model] if model in known else counts(group)
            facts.update(known[model])
        except Exception as error:  # whatever a config of another version lacks: told, not hidden
            report["notes"].append(
                f"{group.name}: its model cannot be built here to be counted:"
                f" {type(error).__name__}: {error}"
            )
        bar.step(done)
    if latency:
        report["latency"] = latency.what
        report["notes"] += latency.notes
        for facts in report["groups"]:
            facts["seconds"] = latency.seconds.get(facts["name"])
