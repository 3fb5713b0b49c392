"""A run's detections against the truth, once more, so that one can look at every image."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.analysis.compare.bootstrap import Matches, matches_of
from fpn_plugin.analysis.compare.runs import Run
from fpn_plugin.analysis.report.bar import Bar
from fpn_plugin.engine.size_bins import area_ranges, bin_names, count_objects, mean_precision

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AREAS = {"all": [0, 1e5**2], "s": [0, 32**2], "m": [32**2, 96**2], "l": [96**2, 1e5**2]}
_TOLERANCE = 0.01  # points of AP between metrics.json and what the detections give
_DETECTIONS = 100  # of an image, that COCO's AP counts


@dataclass(frozen=True)
class Score:
    """What a run's detections are worth.

    Attributes:
        metrics: in percent: those of METRICS, "AP-<category>" and "AP@<bin>".
        matches: of each category.
    """

    metrics: Mapping[str, float]
    matches: Sequence[Matches]


Scores = Mapping[str, Mapping[str, Score]]
"""By run and task."""


@dataclass(frozen=True)
class Truth:
    """A test set's annotations."""

    coco: Any

    @property
    def images(self) -> list[Any]:
        return sorted(self.coco.getImgIds())

    def objects(self, edges: Sequence[float]) -> dict[str, int]:
        """How many there are by size bin."""
        return dict(zip(bin_names(edges), count_objects(self.coco, self.images, edges)))


def load_truth(run: Run) -> Truth | str:
    """The annotations of the test set of a run, or why there are none."""
    path = run.truth
    if not path:
        if run.dataset not in DatasetCatalog.list():
            return f"the dataset {run.dataset!r} is not registered here"
        metadata = MetadataCatalog.get(run.dataset)
        if metadata.get("evaluator_type", None) not in ("coco", "coco_panoptic_seg"):
            return f"the dataset {run.dataset!r} is not evaluated by COCO's rules"
        path = metadata.get("json_file", "")
    if not Path(path).is_file():
        return f"the annotations of {run.dataset!r} are not here ({path or 'no file is named'})"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
    return Truth(coco) if "annotations" in coco.dataset else f"{path} has no annotations"


def score(path: Path, truth: Truth, edges: Sequence[float]) -> dict[str, Score]:
    """By task, what the detections in a file are worth; nothing if there are none at all.

    Raises:
        ValueError: naming the file, if it is no list of detections in the images of the truth.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        strangers = {result["image_id"] for result in results} - set(truth.images)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no list of COCO results: {error!r}") from error
    if strangers:
        raise ValueError(
            f"{str(path)!r} has detections in {len(strangers)} images that the test set does not"
            f" have, such as {sorted(strangers)[0]!r}: it is of other data"
        )
    tasks = ["bbox"] if results else []
    tasks += ["segm"] if any("segmentation" in result for result in results) else []
    return {task: _score(results, truth, task, edges) for task in tasks}


def _score(
    results: Sequence[dict[str, Any]], truth: Truth, task: str, edges: Sequence[float]
) -> Score:
    found = copy.deepcopy(list(results))
    if task == "segm":
        for result in found:  # else the area would be the box's, as in Detectron2's evaluator
            result.pop("bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth.coco, truth.coco.loadRes(found), task)
        evaluation.params.maxDets = [_DETECTIONS]
        evaluation.params.areaRng = [*_AREAS.values(), *area_ranges(edges)]
        evaluation.params.areaRngLbl = [*_AREAS, *bin_names(edges)]
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU, recall, category, area)
    precision = evaluation.eval["precision"][..., 0]
    values = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    values += [precision[..., i] for i in (1, 2, 3)]
    metrics = {name: mean_precision(value) for name, value in zip(METRICS, values, strict=True)}
    categories = truth.coco.loadCats(evaluation.params.catIds)
    if len(categories) > 1:
        for i, category in enumerate(categories):
            metrics[f"AP-{category['name']}"] = mean_precision(precision[:, :, i, 0])
    for i, name in enumerate(bin_names(edges), len(_AREAS)):
        metrics[f"AP@{name}"] = mean_precision(precision[..., i])
    return Score(metrics, matches_of(evaluation))


def score_runs(
    runs: Sequence[Run], truth: Truth, edges: Sequence[float], notes: list[str], bar: Bar
) -> Scores:
    """Of each run whose detections are there; what is odd is added to the notes."""
    found = {}
    bar.begin("detections against the truth", len(runs))
    for done, run in enumerate(runs):
        bar.step(done)
        if run.results is None:
            notes.append(f"{run.name}: no detections are there; its AP is metrics.json's.")
            continue
        found[run.name] = score(run.results, truth, edges)
        if not found[run.name]:
            notes.append(f"{run.name} detected nothing at all.")
        for task, of in found[run.name].items():
            told = run.metrics.get(f"{task}/AP", of.metrics["AP"])
            if not abs(told - of.metrics["AP"]) <= _TOLERANCE:
                notes.append(
                    f"{run.name}: {task} AP is {told:.2f} in metrics.json, but"
                    f" {of.metrics['AP']:.2f} by its detections, which are told here."
                )
    return found
