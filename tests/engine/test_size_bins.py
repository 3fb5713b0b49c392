"""AP by size bins: equal to pycocotools' with the same areas, from evaluator to metrics.json."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from comparing import detect, write_truth
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import tiny_config

from fpn_plugin.evaluation.build import build_evaluator, check_evaluators
from fpn_plugin.evaluation.size_bins import check_edges

NAME = "size_bins_val"


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A registered test set."""
    path = tmp_path / "truth.json"
    content = write_truth(path)
    register_coco_instances(NAME, {}, str(path), str(tmp_path))
    DatasetCatalog.get(NAME)  # so that the categories are known
    yield content
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def evaluate(
    folder: Path,
    truth: dict[str, Any],
    bins: list[float],
    results: list[dict[str, Any]],
    fast: bool = False,
) -> dict[str, Any]:
    """The results of a config's evaluator for detections with masks."""
    cfg = tiny_config(folder, DATASETS__TEST=(NAME,), TEST__SIZE_BINS=bins)
    cfg.TEST.FAST_COCO_EVAL = fast
    check_evaluators(cfg)
    evaluator = build_evaluator(cfg, NAME)
    evaluator.reset()
    for image in truth["images"]:
        detections = [result for result in results if result["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        instances = Instances(size)
        boxes = torch.tensor([result["bbox"] for result in detections]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([result["score"] for result in detections])
        classes = [result["category_id"] - 3 for result in detections]
        instances.pred_classes = torch.tensor(classes).long()
        pixels = [mask_util.decode(result["segmentation"]) for result in detections]
        instances.pred_masks = torch.tensor(np.array(pixels).reshape(-1, *size)).bool()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def by_hand(folder: Path, task: str, low: float, high: float) -> float:
    """pycocotools' AP of the detections that the evaluator wrote, with one area range."""
    coco = COCO(str(folder.parent / "truth.json"))
    results = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    for result in results if task == "segm" else []:
        del result["bbox"]
    evaluation = COCOeval(coco, coco.loadRes(results), task)
    evaluation.params.areaRng = [[low, high]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean() * 100)


@pytest.mark.parametrize("fast", [False, True])
def test_each_bin_is_pycocotools_with_its_areas(
    tmp_path: Path, truth: dict[str, Any], fast: bool
) -> None:
    edges = [8, 16, 32.5, 64]
    results = evaluate(tmp_path / "run", truth, edges, detect(truth, 0.4, masks=True), fast)
    areas = [(0, 64), (64, 256), (256, 32.5**2), (32.5**2, 4096), (4096, 1e10)]
    names = ["0-8", "8-16", "16-32.5", "32.5-64", "64-inf"]
    for task in ("bbox", "segm"):
        expected = [by_hand(tmp_path / "run", task, *area) for area in areas]
        assert len({round(value, 3) for value in expected}) == 5, "the bins shall differ"
        assert [results[task][f"AP@{name}"] for name in names] == pytest.approx(expected, abs=1e-9)


def test_objects_are_counted_and_an_empty_bin_is_logged_as_a_dash(
    tmp_path: Path, truth: dict[str, Any], log: pytest.LogCaptureFixture
) -> None:
    results = evaluate(tmp_path / "run", truth, [4, 64], detect(truth, 0.1, masks=True))["bbox"]
    assert math.isnan(results["AP@0-4"])
    # 96 and 110 pixels long; the crowd does not count
    assert [results[f"objects@{name}"] for name in ("0-4", "4-64", "64-inf")] == [0, 35, 12]
    assert "| 0-4              | –" in log.text


def test_without_detections_there_is_no_ap_but_the_objects(
    tmp_path: Path, truth: dict[str, Any]
) -> None:
    results = evaluate(tmp_path / "run", truth, [64], [])["bbox"]
    assert math.isnan(results["AP@0-64"])
    assert results["objects@64-inf"] == 12


def test_without_the_key_the_results_are_detectron2s(tmp_path: Path, truth: dict[str, Any]) -> None:
    results = evaluate(tmp_path / "run", truth, [], detect(truth, 0.1, masks=True))
    assert not [key for metrics in results.values() for key in metrics if "@" in key]


@pytest.mark.parametrize("edges", [[8, 8], [16, 8], [0, 8], [-1], ["8"], 8, [True], [math.nan]])
def test_bad_edges_are_refused_with_the_key_and_the_value(edges: Any) -> None:
    with pytest.raises(ValueError, match=f"TEST.SIZE_BINS: {re.escape(repr(edges))}"):
        check_edges(edges)


def test_config_is_checked_before_training(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"TEST.SIZE_BINS: \[16, 8\]"):
        check_evaluators(tiny_config(tmp_path, TEST__SIZE_BINS=[16, 8]))
    cfg = tiny_config(tmp_path, TEST__SIZE_BINS=[16], DATASETS__TEST=("voc_2007_test",))
    check_evaluators(cfg)
    assert "TEST.SIZE_BINS does nothing for voc_2007_test" in log.text
