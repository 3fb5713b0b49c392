"""AP of a benchmark's models on data, with the paired differences: what a speed costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Mapping

import numpy as np

from fpn_plugin.benchmark.models import BenchmarkModel, prepare
from fpn_plugin.evaluation.bootstrap import (
    average_precision,
    difference,
    draw_images,
    images_with_hits,
)
from fpn_plugin.evaluation.coco_metrics import detection_limit
from fpn_plugin.evaluation.scores import METRICS, Score, score_results, support_of
from fpn_plugin.modeling.python_config import test_mapper
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.test_data import TestData, find_objects, part_of, read_test_data

__all__ = ["measure_ap", "read_test_data"]
RESAMPLES = 1000
NOT_TRAINED = "the checkpoint is not the whole of its weights"
NO_DETECTIONS = "it gives no boxes of objects"


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
    truth = part_of(data.truth, images)
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


def _detect(model: BenchmarkModel, data: TestData, bar: Bar) -> list[dict[str, Any]] | None:
    """A model's detections in COCO's format; None if it gives none at all."""
    cfg = model.config.cfg
    ready = prepare(model.model, cfg, training=False)

    def predict(model_input: Mapping[str, Any]) -> Mapping[str, Any]:
        with ready.autocast():
            output: Mapping[str, Any] = ready.model([model_input])[0]
            return output

    return find_objects(predict, test_mapper(cfg), data, model.name, bar)


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
        aps[name, task] = np.array([average_precision(matches, weights) for weights in draws])
        bar.step(done)
    rows = []
    for name, reference, task in wanted:
        pair = scores[name][task], scores[reference][task]
        result = difference(
            (pair[0].metrics["AP"], pair[1].metrics["AP"]),
            aps[name, task],
            aps[reference, task],
            images_with_hits([score.matches for score in pair]),
        )
        rows.append({"contestant": name, "reference": reference, "task": task, **asdict(result)})
    return rows
