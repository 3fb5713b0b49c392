"""AP of a benchmark's models on data, with the paired differences: what a speed costs."""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict, dataclass
from typing import Any, Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools.coco import COCO

from fpn_plugin.benchmark.models import BenchmarkModel, prepare
from fpn_plugin.data.classes import adopt_classes, check_test_classes
from fpn_plugin.data.coco_format import needed_splits, register_own
from fpn_plugin.evaluation.bootstrap import (
    Sample,
    average_precision,
    difference,
    draw_images,
    images_with_hits,
)
from fpn_plugin.evaluation.coco_metrics import detection_limit
from fpn_plugin.evaluation.scores import METRICS, Score, load_truth, score_results, support_of
from fpn_plugin.modeling.python_config import test_mapper
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.images import all_records

DATASET, NUM = "--dataset", "--num"
RESAMPLES = 1000
NOT_TRAINED = "the checkpoint is not the whole of its weights"
NO_DETECTIONS = "it gives no boxes of objects"


@dataclass(frozen=True)
class TestData:
    """Images of a dataset, and the truth.

    Attributes:
        records: the images, evenly spread over the dataset's.
        total: how many images the dataset has.
        classes: the dataset's category id of each class of a model.
    """

    __test__ = False  # for pytest, which takes it for a test by its name

    name: str
    records: Sequence[dict[str, Any]]
    total: int
    truth: COCO
    classes: Sequence[Any]


def read_test_data(name: str, num: int, configs: Sequence[CfgNode], weights: str) -> TestData:
    """Read some images of a dataset.

    Args:
        num: at most so many.
        configs: of the models; their `DATASETS.OWN` are registered for "own_val".
        weights: the checkpoint, whose classes must be the dataset's if it knows them.

    Raises:
        KeyError: if there is no such dataset.
        ValueError: if its classes are not the model's, or it has no truth by COCO's rules.
        FileNotFoundError: if its files are not there.
    """
    if not weights:
        raise ValueError(f"{DATASET} {name}: AP of random weights says nothing; give --weights")
    if num < 1:
        raise ValueError(f"{NUM} {num} is not a number of images of 1 or more")
    own = [cfg for cfg in configs if cfg.DATASETS.OWN.VAL_JSON] if name == "own_val" else []
    if name == "own_val" and not own:
        raise ValueError(f"{DATASET} {name}: no config has a DATASETS.OWN.VAL_JSON")
    if len({cfg.DATASETS.OWN.VAL_JSON for cfg in own}) > 1:
        files = ", ".join(dict.fromkeys(cfg.DATASETS.OWN.VAL_JSON for cfg in own))
        raise ValueError(
            f"{DATASET} {name}: the configs have different test sets, which cannot be compared:"
            f" {files} (DATASETS.OWN.VAL_JSON)"
        )
    known = (own or list(configs))[-1].clone()
    known.defrost()
    adopt_classes(known, weights)
    register_own(known, needed=needed_splits(name))
    records = all_records(name)
    check_test_classes(known, name)
    truth = load_truth(name)
    if isinstance(truth, str):
        raise ValueError(f"{DATASET} {name}: no AP without the truth: {truth}")
    count = min(num, len(records))
    chosen = [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") or {}
    classes = [key for key, _ in sorted(ids.items(), key=lambda entry: entry[1])]
    return TestData(name, chosen, len(records), truth, classes or sorted(truth.getCatIds()))


def measure_ap(models: Mapping[str, BenchmarkModel], data: TestData, bar: Bar) -> dict[str, Any]:
    """AP of every model whose weights are all the checkpoint's, and the differences of pairs.

    Each model is run as its config says: in its precision, at its test size, with its threshold.

    Returns:
        ready for JSON but for nan: "models", each with its "metrics" in percent such as "bbox/AP",
        its test "size" and a "note" why there are none; "pairs", with the fields of
        :class:`Difference` by task; and what it was measured on.

    Raises:
        ValueError: if a model predicts a class that the dataset does not have.
    """
    images = [record["image_id"] for record in data.records]
    limits = [model.config.cfg.TEST.DETECTIONS_PER_IMAGE for model in models.values()]
    limit = max(detection_limit(each) for each in limits)
    truth = _part_of(data.truth, images)
    scores: dict[str, dict[str, Score]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        test = model.config.cfg.INPUT
        metrics: dict[str, float] = {}
        entry = {"metrics": metrics, "size": [test.MIN_SIZE_TEST, test.MAX_SIZE_TEST], "note": ""}
        entries[name] = entry
        results = _detect(model, data, bar) if model.trained else None
        if results is None:
            entry["note"] = NO_DETECTIONS if model.trained else NOT_TRAINED
            continue
        scores[name] = score_results(results, truth, limit)
        if not scores[name]:
            entry["note"] = "it found nothing at all"
        elif model.config.cfg.MODEL.KEYPOINT_ON:
            entry["note"] = "boxes alone: AP of keypoints is not measured"
        for task, score in scores[name].items():
            metrics |= {f"{task}/{key}": score.metrics[key] for key in METRICS}
    support = support_of(truth)["AP"]
    return {
        "dataset": data.name,
        "images": len(images),
        "total": data.total,
        "objects": support.objects,
        "limit": limit,
        "resamples": RESAMPLES,
        "models": entries,
        "pairs": _pairs(models, scores, len(images), bar),
    }


def _part_of(truth: COCO, images: Sequence[Any]) -> COCO:
    """The truth of some images."""
    kept = set(images)
    part = COCO()
    part.dataset = {
        **truth.dataset,
        "images": [image for image in truth.dataset["images"] if image["id"] in kept],
        "annotations": [a for a in truth.dataset["annotations"] if a["image_id"] in kept],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        part.createIndex()
    return part


@torch.no_grad()
def _detect(model: BenchmarkModel, data: TestData, bar: Bar) -> list[dict[str, Any]] | None:
    """A model's detections in COCO's format; None if it gives none at all."""
    cfg = model.config.cfg
    ready, mapper = prepare(model.model, cfg, training=False), test_mapper(cfg)
    results: list[dict[str, Any]] = []
    bar.begin(f"AP on {data.name}: {model.name}", len(data.records))
    for done, record in enumerate(data.records, 1):
        with ready.autocast():
            (output,) = ready.model([mapper(dict(record))])
        if "instances" not in output:
            return None
        instances = output["instances"].to("cpu")
        instances.pred_boxes.tensor = instances.pred_boxes.tensor.float()
        instances.scores = instances.scores.float()
        for result in instances_to_coco_json(instances, record["image_id"]):
            if result["category_id"] >= len(data.classes):
                raise ValueError(
                    f"{DATASET} {data.name} has {len(data.classes)} classes, but {model.name}"
                    f" predicts class {result['category_id']}: it was trained on other data"
                )
            result.pop("keypoints", None)
            results.append({**result, "category_id": data.classes[result["category_id"]]})
        bar.step(done)
    return results


def _pairs(
    models: Mapping[str, BenchmarkModel],
    scores: Mapping[str, Mapping[str, Score]],
    images: int,
    bar: Bar,
) -> list[dict[str, Any]]:
    draws = draw_images(images, RESAMPLES)
    wanted = [
        (model.name, reference, task)
        for model in models.values()
        for reference in model.config.references
        for task in scores.get(model.name, {})
        if task in scores.get(reference, {})
    ]
    used = list(dict.fromkeys((name, task) for *pair, task in wanted for name in pair))
    bar.begin("bootstrap over the images", len(used))
    aps: dict[tuple[str, str], np.ndarray] = {}
    for done, (name, task) in enumerate(used, 1):
        matches = scores[name][task].matches
        aps[name, task] = np.array([[average_precision(matches, weights) for weights in draws]])
        bar.step(done)
    rows = []
    for name, reference, task in wanted:
        pair = scores[name][task], scores[reference][task]
        ours, theirs = (
            Sample(np.array([score.metrics["AP"]]), aps[each, task])
            for each, score in zip((name, reference), pair)
        )
        result = difference(ours, theirs, images_with_hits([score.matches for score in pair]))
        rows.append({"contestant": name, "reference": reference, "task": task, **asdict(result)})
    return rows
