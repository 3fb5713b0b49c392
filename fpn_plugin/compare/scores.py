"""AP of runs, evaluated anew from their detections, and each config against every other."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.compare.bootstrap import (
    Matches,
    average_precision,
    difference,
    draw_images,
    matches_of,
)
from fpn_plugin.compare.runs import Group, Run
from fpn_plugin.data.coco_records import mask_truth, read_truth
from fpn_plugin.evaluation.coco_metrics import COCO_LIMIT, detection_limit, prepare_truth
from fpn_plugin.evaluation.size_bins import area_ranges, bin_names, mean_precision
from fpn_plugin.registry import HOW_TO_ADD
from fpn_plugin.report.progress import Bar

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AREAS = {"all": [0, 1e5**2], "s": [0, 32**2], "m": [32**2, 96**2], "l": [96**2, 1e5**2]}
_TOLERANCE = 0.01  # points of AP between metrics.json and what the detections give


@dataclass(frozen=True)
class Score:
    """The evaluation of a run's detections.

    Attributes:
        metrics: in percent: those of METRICS, "AP-<category>" and "AP@<bin>".
        matches: of each category.
    """

    metrics: Mapping[str, float]
    matches: Sequence[Matches]


Scores = Mapping[str, Mapping[str, Score]]
"""By run and task."""


def load_truth(run: Run) -> COCO | str:
    """The annotations of a run's test set, or the reason why there are none."""
    path = run.truth
    if not path:
        if run.dataset not in DatasetCatalog.list():
            return f"the dataset {run.dataset!r} is not registered here ({HOW_TO_ADD})"
        metadata = MetadataCatalog.get(run.dataset)
        if metadata.get("evaluator_type", None) not in ("coco", "coco_panoptic_seg"):
            return f"the dataset {run.dataset!r} is not evaluated by COCO's rules"
        path = metadata.get("json_file", "")
    if not Path(path).is_file():
        return f"the annotations of {run.dataset!r} are not here ({path or 'no file is named'})"
    coco = prepare_truth(read_truth(str(path)))
    return coco if "annotations" in coco.dataset else f"{path} has no annotations"


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
    metrics = {group["name"]: group["metrics"] for group in report["groups"]}
    pairs: dict[str, Any] = {}
    for task in report["tasks"]:
        scored = {
            group.name: [scores[run.name][task] for run in group.runs]
            for group in groups
            if all(task in scores.get(run.name, {}) for run in group.runs)
        }
        if len(scored) < 2:
            continue
        aps = _mean_ap_of_draws(scored, draws, task, bar)
        values = {name: metrics[name][f"{task}/AP"]["mean"] for name in scored}
        pairs[task] = {
            first: {
                second: asdict(difference(values[first] - values[second], aps[first], aps[second]))
                for second in aps
                if second != first
            }
            for first in aps
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
    tasks = ["bbox"] if results else []
    tasks += ["segm"] if any("segmentation" in result for result in results) else []
    return {task: _evaluate(results, truth, task, edges, limit) for task in tasks}


def _evaluate(
    results: Sequence[dict[str, Any]], truth: COCO, task: str, edges: Sequence[float], limit: int
) -> Score:
    results = copy.deepcopy(list(results))  # pycocotools adds to them
    if task == "segm":
        for result in results:  # else the area would be the box's, as in Detectron2's evaluator
            result.pop("bbox", None)
    truth = mask_truth(truth) if task == "segm" else truth
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), task)
        evaluation.params.maxDets = [limit]
        evaluation.params.areaRng = [*_AREAS.values(), *area_ranges(edges)]
        evaluation.params.areaRngLbl = [*_AREAS, *bin_names(edges)]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # (IoU, recall, category, area)
    values = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    values += [precision[..., i] for i in (1, 2, 3)]
    metrics = {name: mean_precision(value) for name, value in zip(METRICS, values, strict=True)}
    categories = truth.loadCats(evaluation.params.catIds)
    if len(categories) > 1:
        for i, category in enumerate(categories):
            metrics[f"AP-{category['name']}"] = mean_precision(precision[:, :, i, 0])
    for i, name in enumerate(bin_names(edges), len(_AREAS)):
        metrics[f"AP@{name}"] = mean_precision(precision[..., i])
    return Score(metrics, matches_of(evaluation))


def _mean_ap_of_draws(
    groups: Mapping[str, Sequence[Score]], draws: np.ndarray, task: str, bar: Bar
) -> dict[str, np.ndarray]:
    """`(N,)` the mean AP of each group's runs on each draw."""
    done = 0
    bar.begin(f"bootstrap, {task}", len(draws) * sum(map(len, groups.values())))
    means = {}
    for name, scores in groups.items():
        aps = np.empty((len(scores), len(draws)))
        for i, score in enumerate(scores):
            for j, weights in enumerate(draws):
                aps[i, j] = average_precision(score.matches, weights)
                done += 1
                bar.step(done)
        means[name] = aps.mean(axis=0)
    return means
