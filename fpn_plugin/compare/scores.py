"""AP of runs, evaluated anew from their detections, and each config against every other."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO

from fpn_plugin.compare.runs import Group, Run
from fpn_plugin.evaluation.bootstrap import (
    Sample,
    average_precision,
    difference,
    draw_images,
    images_with_hits,
)
from fpn_plugin.evaluation.coco_metrics import COCO_LIMIT, detection_limit
from fpn_plugin.evaluation.scores import Score, score_results
from fpn_plugin.report.progress import Bar

_TOLERANCE = 0.01  # points of AP between metrics.json and what the detections give

Scores = Mapping[str, Mapping[str, Score]]
"""By run and task."""


def score_runs(
    runs: Sequence[Run], truth: COCO, edges: Sequence[float], notes: list[str], bar: Bar
) -> Scores:
    """Evaluate each run whose detections exist.

    Args:
        edges: of the size bins.
        notes: what a reader should know of the runs' detections is appended.

    Raises:
        ValueError: naming a file that holds no detections in the images of the truth.
    """
    # the same number for all runs; no run has more detections than its own config lets it
    limit = max(detection_limit(int(run.config["TEST.DETECTIONS_PER_IMAGE"])) for run in runs)
    if limit > COCO_LIMIT:
        notes.append(
            f"AP counts {limit} detections of a category in an image (TEST.DETECTIONS_PER_IMAGE),"
            f" not COCO's {COCO_LIMIT}."
        )
    scores = {}
    bar.begin("detections against the truth", len(runs))
    for done, run in enumerate(runs):
        bar.step(done)
        if run.results is None:
            notes.append(f"{run.name}: no detections are there; its AP is metrics.json's.")
            continue
        scores[run.name] = _score(run.results, truth, edges, limit)
        if not scores[run.name]:
            notes.append(f"{run.name} detected nothing at all.")
        for task, score in scores[run.name].items():
            ap = score.metrics["AP"]
            recorded = run.metrics.get(f"{task}/AP", ap)
            if not np.isclose(recorded, ap, rtol=0, atol=_TOLERANCE, equal_nan=True):
                notes.append(
                    f"{run.name}: {task} AP is {recorded:.2f} in metrics.json, but {ap:.2f} by its"
                    " detections, which are reported here."
                )
    return scores


def compare_pairs(
    groups: Sequence[Group], scores: Scores, report: Mapping[str, Any], bar: Bar
) -> dict[str, Any]:
    """The paired bootstrap of each config against every other.

    Args:
        report: with the number of images and resamples, the tasks and the groups' metrics.

    Returns:
        by task and two groups, the fields of :class:`Difference` of the first to the second.
    """
    draws = draw_images(report["images"], report["resamples"])
    pairs: dict[str, Any] = {}
    for task in report["tasks"]:
        scored = {
            group.name: [scores[run.name][task] for run in group.runs]
            for group in groups
            if all(task in scores.get(run.name, {}) for run in group.runs)
        }
        if len(scored) < 2:
            continue
        samples = _samples(groups, scored, draws, task, bar)
        matches = {name: [score.matches for score in scored[name]] for name in scored}

        def compare_two(first: str, second: str) -> dict[str, Any]:
            images = images_with_hits([*matches[first], *matches[second]])
            return asdict(difference(samples[first], samples[second], images))

        pairs[task] = {
            first: {second: compare_two(first, second) for second in samples if second != first}
            for first in samples
        }
    return pairs


def _score(path: Path, truth: COCO, edges: Sequence[float], limit: int) -> dict[str, Score]:
    """Evaluate the detections of a file, by task; {} if it holds none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        strangers = {result["image_id"] for result in results} - set(truth.getImgIds())
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no list of COCO results: {error!r}") from error
    if strangers:
        raise ValueError(
            f"{str(path)!r} has detections in {len(strangers)} images that the test set does not"
            f" have, such as {sorted(strangers)[0]!r}: it is of other data"
        )
    return score_results(results, truth, limit, edges)


def _samples(
    groups: Sequence[Group],
    scored: Mapping[str, Sequence[Score]],
    draws: np.ndarray,
    task: str,
    bar: Bar,
) -> dict[str, Sample]:
    """By group, the APs of its runs, on all images and on each draw."""
    seeds = {group.name: [run.seed for run in group.runs] for group in groups}
    done = 0
    bar.begin(f"bootstrap, {task}", len(draws) * sum(map(len, scored.values())))
    samples = {}
    for name, scores in scored.items():
        aps = np.empty((len(scores), len(draws)))
        for i, score in enumerate(scores):
            for j, weights in enumerate(draws):
                aps[i, j] = average_precision(score.matches, weights)
                done += 1
                bar.step(done)
        whole = np.array([score.metrics["AP"] for score in scores])
        samples[name] = Sample(whole, aps, seeds[name])
    return samples
