"""AP of detections in COCO's format, and the matches that a bootstrap needs."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.data.coco_records import mask_truth, read_truth
from fpn_plugin.evaluation.bootstrap import Matches, matches_of
from fpn_plugin.evaluation.coco_metrics import prepare_truth
from fpn_plugin.evaluation.size_bins import area_ranges, bin_names, mean_precision
from fpn_plugin.registry import HOW_TO_ADD

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AREAS: dict[str, list[float]] = {
    "all": [0, 1e5**2],
    "s": [0, 32**2],
    "m": [32**2, 96**2],
    "l": [96**2, 1e5**2],
}


@dataclass(frozen=True)
class Score:
    """The evaluation of detections.

    Attributes:
        metrics: in percent: those of METRICS, "AP-<category>" and "AP@<bin>".
        matches: of each category.
        by_class: those of METRICS for each category, by its name.
    """

    metrics: Mapping[str, float]
    matches: Sequence[Matches]
    by_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Support(NamedTuple):
    """What a metric rests on: the objects that count in it, and the images that have some."""

    objects: int
    images: int


def load_truth(dataset: str, path: str = "") -> COCO | str:
    """The annotations of a test set, or the reason why there are none.

    Args:
        path: of the annotations; "" for those of the registered dataset.
    """
    if not path:
        if dataset not in DatasetCatalog.list():
            return f"the dataset {dataset!r} is not registered here ({HOW_TO_ADD})"
        metadata = MetadataCatalog.get(dataset)
        if metadata.get("evaluator_type", None) not in ("coco", "coco_panoptic_seg"):
            return f"the dataset {dataset!r} is not evaluated by COCO's rules"
        path = metadata.get("json_file", "")
    if not Path(path).is_file():
        return f"the annotations of {dataset!r} are not here ({path or 'no file is named'})"
    coco = prepare_truth(read_truth(str(path)))
    return coco if "annotations" in coco.dataset else f"{path} has no annotations"


def score_results(
    results: Sequence[dict[str, Any]],
    truth: COCO,
    limit: int,
    edges: Sequence[float] = (),
    images: Sequence[Any] | None = None,
) -> dict[str, Score]:
    """Evaluate detections, by task; {} if there are none.

    Args:
        results: in COCO's format.
        truth: of :func:`load_truth`.
        limit: the detections of a category in an image that count.
        edges: of the size bins.
        images: the ids of those that count; None for all.
    """
    tasks = ["bbox"] if results else []
    tasks += ["segm"] if any("segmentation" in result for result in results) else []
    return {task: _evaluate(results, truth, task, limit, edges, images) for task in tasks}


def _evaluate(
    results: Sequence[dict[str, Any]],
    truth: COCO,
    task: str,
    limit: int,
    edges: Sequence[float],
    images: Sequence[Any] | None,
) -> Score:
    results = copy.deepcopy(list(results))  # pycocotools adds to them
    if task == "segm":
        for result in results:  # else the area would be the box's, as in Detectron2's evaluator
            result.pop("bbox", None)
    truth = mask_truth(truth) if task == "segm" else truth
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), task)
        evaluation.params.maxDets = [limit]
        if images is not None:
            evaluation.params.imgIds = sorted(images)
        evaluation.params.areaRng = [*_AREAS.values(), *area_ranges(edges)]
        evaluation.params.areaRngLbl = [*_AREAS, *bin_names(edges)]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # (IoU, recall, category, area)
    metrics = _coco_metrics(precision)
    names = [category["name"] for category in truth.loadCats(evaluation.params.catIds)]
    by_class = {name: _coco_metrics(precision[:, :, i]) for i, name in enumerate(names)}
    if len(names) > 1:
        metrics |= {f"AP-{name}": values["AP"] for name, values in by_class.items()}
    for i, name in enumerate(bin_names(edges), len(_AREAS)):
        metrics[f"AP@{name}"] = mean_precision(precision[..., i])
    return Score(metrics, matches_of(evaluation), by_class)


def _coco_metrics(precision: np.ndarray) -> dict[str, float]:
    """METRICS of a part of pycocotools' precision, `(IoU, recall, …, area)`."""
    values = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    values += [precision[..., i] for i in (1, 2, 3)]
    return {name: mean_precision(value) for name, value in zip(METRICS, values, strict=True)}


def support_of(truth: COCO, edges: Sequence[float] = ()) -> dict[str, Support]:
    """What each metric rests on. An object on the edge of two sizes counts in both, as in AP."""
    objects: dict[str, int] = defaultdict(int)
    images: dict[str, set[Any]] = defaultdict(set)
    bins = dict(zip([f"AP@{name}" for name in bin_names(edges)], area_ranges(edges)))
    sizes = {**{name: _AREAS[name[2:]] for name in METRICS[3:]}, **bins}
    names = {key: category["name"] for key, category in truth.cats.items()}
    for annotation in truth.dataset.get("annotations", []):
        if annotation.get("iscrowd"):
            continue
        area = annotation["area"]
        keys = [*METRICS[:3], f"AP-{names.get(annotation['category_id'])}"]
        keys += [key for key, (low, high) in sizes.items() if low <= area <= high]
        for key in keys:
            objects[key] += 1
            images[key].add(annotation["image_id"])
    known = [*METRICS, *bins, *(f"AP-{name}" for name in names.values())]
    return {key: Support(objects[key], len(images[key])) for key in known}
