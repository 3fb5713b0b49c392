"""AP by size bins: equal to pycocotools' with the same areas, from evaluator to metrics.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from comparing import detect, write_truth
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools import mask as masks_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import tiny_config

from fpn_plugin.engine.evaluation import build_evaluator, check_evaluators
from fpn_plugin.engine.size_bins import area_ranges, bin_names, check_edges

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
    """What the evaluator of a config gives for detections with masks."""
    cfg = tiny_config(folder, DATASETS__TEST=(NAME,), TEST__SIZE_BINS=bins)
    cfg.TEST.FAST_COCO_EVAL = fast
    check_evaluators(cfg)
    evaluator = build_evaluator(cfg, NAME)
    evaluator.reset()
    for image in truth["images"]:
        found = [one for one in results if one["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        instances = Instances(size)
        boxes = torch.tensor([one["bbox"] for one in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([one["score"] for one in found])
        instances.pred_classes = torch.tensor([one["category_id"] - 3 for one in found]).long()
        pixels = [masks_of.decode(one["segmentation"]) for one in found]
        instances.pred_masks = torch.tensor(np.array(pixels).reshape(-1, *size)).bool()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def by_hand(folder: Path, task: str, low: float, high: float) -> float:
    """pycocotools on what the evaluator wrote, with one area range."""
    coco = COCO(str(folder.parent / "truth.json"))
    found = coco.loadRes(str(folder / "inference" / "coco_instances_results.json"))
    if task == "segm":
        results = [dict(one) for one in found.dataset["annotations"]]
        for one in results:
            del one["bbox"]
        found = coco.loadRes(results)
    evaluation = COCOeval(coco, found, task)
    evaluation.params.areaRng = [[low, high]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean() * 100)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_each_bin_is_pycocotools_with_its_areas(
    tmp_path: Path, truth: dict[str, Any], task: str, fast: bool
) -> None:
    edges = [8, 16, 32.5, 64]
    found = evaluate(tmp_path / "run", truth, edges, detect(truth, 0.4, masks=True), fast)[task]
    areas = [(0, 64), (64, 256), (256, 32.5**2), (32.5**2, 4096), (4096, 1e10)]
    wanted = [by_hand(tmp_path / "run", task, *area) for area in areas]
    names = ["0-8", "8-16", "16-32.5", "32.5-64", "64-inf"]
    assert len({round(value, 3) for value in wanted}) == 5, "bins that differ"
    assert [found[f"AP@{name}"] for name in names] == pytest.approx(wanted, abs=1e-9)


def test_with_cocos_own_edges_it_gives_cocos_own_numbers(
    tmp_path: Path, truth: dict[str, Any]
) -> None:
    found = evaluate(tmp_path / "run", truth, [32, 96], detect(truth, 0.4, masks=True))
    for task in ("bbox", "segm"):
        ours = [found[task][f"AP@{name}"] for name in ("0-32", "32-96", "96-inf")]
        assert ours == pytest.approx([found[task][name] for name in ("APs", "APm", "APl")])


def test_objects_are_counted_and_an_empty_bin_is_told_as_a_dash(
    tmp_path: Path, truth: dict[str, Any], log: pytest.LogCaptureFixture
) -> None:
    found = evaluate(tmp_path / "run", truth, [4, 64], detect(truth, 0.1, masks=True))["bbox"]
    assert math.isnan(found["AP@0-4"])
    # 96 and 110 pixels long; the crowd is none
    assert [found[f"objects@{name}"] for name in ("0-4", "4-64", "64-inf")] == [0, 35, 12]
    assert "| 0-4              | –" in log.text


def test_without_detections_there_is_no_ap_but_the_objects(
    tmp_path: Path, truth: dict[str, Any]
) -> None:
    found = evaluate(tmp_path / "run", truth, [64], [])["bbox"]
    assert math.isnan(found["AP@0-64"])
    assert found["objects@64-inf"] == 12


def test_without_the_key_the_results_are_detectron2s(tmp_path: Path, truth: dict[str, Any]) -> None:
    found = evaluate(tmp_path / "run", truth, [], detect(truth, 0.1, masks=True))
    assert not [key for of in found.values() for key in of if "@" in key]


@pytest.mark.parametrize("edges", [[8, 8], [16, 8], [0, 8], [-1], ["8"], 8, [True], [math.nan]])
def test_bad_edges_are_refused_with_the_key_and_the_value(edges: Any) -> None:
    with pytest.raises(ValueError, match="TEST.SIZE_BINS: .*increasing positive") as error:
        check_edges(edges)
    assert repr(edges) in str(error.value)


def test_a_bad_key_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"TEST.SIZE_BINS: \[16, 8\]"):
        check_evaluators(tiny_config(tmp_path, TEST__SIZE_BINS=[16, 8]))


def test_test_sets_that_the_key_does_nothing_for_are_told(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config(tmp_path, TEST__SIZE_BINS=[16], DATASETS__TEST=("voc_2007_test",))
    check_evaluators(cfg)
    assert "TEST.SIZE_BINS does nothing for voc_2007_test" in log.text


def test_names_and_areas() -> None:
    assert bin_names([8, 16.5]) == ["0-8", "8-16.5", "16.5-inf"]
    assert area_ranges([8, 16]) == [[0, 64], [64, 256], [256, 1e10]]
    assert bin_names([]) == area_ranges([]) == []
