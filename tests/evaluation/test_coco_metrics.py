"""AP of perfect detections is 100, whatever ids, keypoints and numbers of objects the truth has."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from fpn_plugin.config import add_fpn_config
from fpn_plugin.evaluation.build import build_evaluator
from fpn_plugin.evaluation.coco_metrics import oks_sigmas
from fpn_plugin.evaluation.scores import load_truth, score_results

NAME = "coco_metrics"
SIDE = 400
HASH = 0x9E3779B97F4A7C15
IDS: dict[str, Callable[[int], Any]] = {
    "negative": lambda i: -1 - i,
    "from zero": lambda i: i,
    "huge": lambda i: 2**63 + i,
    "hashed": lambda i: i * HASH % 2**64,
    "text": lambda i: f"a{i}",
    "float": lambda i: i + 0.0,
}


def truth(objects: int, images: int = 2, keypoints: int = 0) -> dict[str, Any]:
    """Objects of 10 pixels on a grid, of two categories in turn."""
    size = {"height": SIDE, "width": SIDE}
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", **size} for i in range(1, images + 1)],
        "categories": [{"id": 3, "name": "nut"}, {"id": 7, "name": "bolt"}],
        "annotations": [],
    }
    for image in content["images"]:
        for number in range(objects):
            x, y = number % 20 * 20, number // 20 * 20
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": 7 if keypoints == 0 and number % 2 else 3,
                "bbox": [x, y, 10, 10],
                "area": 100,
                "iscrowd": 0,
            }
            if keypoints:
                annotation["keypoints"] = [x + 5, y + 5, 2] * keypoints
            content["annotations"].append(annotation)
    return content


def evaluate(content: dict[str, Any], folder: Path, keypoints: int = 0, **test: Any) -> Any:
    """The results of the truth itself as detections, in order of falling score."""
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    MetadataCatalog.pop(NAME, None)
    MetadataCatalog.get(NAME).set(
        json_file=str(path),
        evaluator_type="coco",
        thing_classes=["nut", "bolt"],
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
    )
    evaluator = build_evaluator(config(folder, **test), NAME)
    evaluator.reset()
    for image in content["images"]:
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((SIDE, SIDE))
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.linspace(1, 0.5, len(found))
        instances.pred_classes = torch.tensor([int(a["category_id"] == 7) for a in found])
        if keypoints:
            points = boxes[:, None, :2].expand(-1, keypoints, -1) + 5.5
            instances.pred_keypoints = torch.cat([points, torch.ones_like(points[..., :1])], 2)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def config(folder: Path, **test: Any) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = (NAME,)
    for key, value in test.items():
        cfg.TEST[key] = value
    return cfg


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", IDS)
def test_annotation_ids_mean_nothing(kind: str, fast: bool, tmp_path: Path) -> None:
    content = truth(6)
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = IDS[kind](number)
    results = evaluate(content, tmp_path, FAST_COCO_EVAL=fast, SIZE_BINS=[32])["bbox"]
    for metric in ("AP", "AP50", "AP75", "APs", "AP-nut", "AP-bolt", "AP@0-32"):
        assert results[metric] == pytest.approx(100)


@pytest.mark.parametrize("kind", ["negative", "huge", "text"])
def test_image_ids_that_the_fast_class_cannot_have(
    kind: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Detectron2's class computes the same numbers."""
    content = truth(6)
    ids = {image["id"]: IDS[kind](image["id"]) for image in content["images"]}
    for image in content["images"]:
        image["id"] = ids[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]
    assert evaluate(content, tmp_path, FAST_COCO_EVAL=True)["bbox"]["AP"] == pytest.approx(100)
    assert f"TEST.FAST_COCO_EVAL is not used for {NAME}" in log.text


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("limit, counted", [(100, 100), (300, 300), (-1, 100_000)])
def test_as_many_detections_count_as_the_model_may_give(
    limit: int,
    counted: int,
    fast: bool,
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    settings = {"FAST_COCO_EVAL": fast, "SIZE_BINS": [32], "DETECTIONS_PER_IMAGE": limit}
    results = evaluate(truth(300), tmp_path, **settings)["bbox"]
    output = capsys.readouterr().out
    # 150 objects of each category, of which COCO's AP sees 100
    expected = 100.0 if counted > 100 else 67 / 101 * 100
    for metric in ("AP", "AP50", "AP75", "APs", "AP-nut", "AP-bolt", "AP@0-32"):
        assert results[metric] == pytest.approx(expected)
    assert results.get("maxDets", 100) == counted
    assert f"| maxDets={counted} ]" in output and output.count("maxDets=") >= 12
    if counted > 100:
        assert f"bbox AP counts {counted} detections" in log.text
        assert "have more objects" not in log.text
    else:
        warnings = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1 and "the best 100 detections" in warnings[0]
        assert "TEST.DETECTIONS_PER_IMAGE" in warnings[0] and "has 150" in warnings[0]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("limit, expected", [(100, 51 / 101 * 100), (150, 100.0)])
def test_keypoints_follow_too(
    limit: int, expected: float, fast: bool, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """COCO counts 20; and without sigmas, three keypoints have a default."""
    settings = {"FAST_COCO_EVAL": fast, "DETECTIONS_PER_IMAGE": limit}
    results = evaluate(truth(40, keypoints=3), tmp_path, keypoints=3, **settings)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["keypoints"]["AP50"] == pytest.approx(expected)
    assert list(results["keypoints"])[:3] == ["AP", "AP50", "AP75"]
    assert results["keypoints"].get("maxDets", 20) == (limit if limit > 100 else 20)
    assert ("the best 20 detections" in log.text) == (limit == 100)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("missing", ["keypoints", "num_keypoints", "empty"])
def test_annotations_that_lack_what_pycocotools_reads(
    missing: str, fast: bool, tmp_path: Path
) -> None:
    """One object has no keypoints, so that a detection of it is neither right nor wrong."""
    content = truth(5, keypoints=3)
    for annotation in content["annotations"]:
        if missing != "num_keypoints":
            annotation["num_keypoints"] = 3
    first = content["annotations"][0]
    if missing == "empty":
        first["keypoints"] = []
    elif missing == "keypoints":
        del first["keypoints"], first["num_keypoints"]
    results = evaluate(content, tmp_path, keypoints=3, FAST_COCO_EVAL=fast)
    assert results["keypoints"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)


def test_keypoints_that_do_not_fit(tmp_path: Path) -> None:
    content = truth(5, keypoints=3)
    with pytest.raises(ValueError, match="annotation 1 has 3 keypoints.*NUM_KEYPOINTS"):
        evaluate(content, tmp_path, keypoints=4)
    with pytest.raises(ValueError, match=r"KEYPOINT_OKS_SIGMAS has 2 values.*\[0.05, 0.05, 0.05\]"):
        evaluate(content, tmp_path, keypoints=3, KEYPOINT_OKS_SIGMAS=[0.1, 0.1])
    with pytest.raises(ValueError, match="positive"):
        oks_sigmas([0.1, 0.0, 0.1], 3)
    assert oks_sigmas([], 17) == [] and oks_sigmas([], 4) == [0.05] * 4


def test_a_set_without_objects_has_no_ap(tmp_path: Path) -> None:
    results = evaluate({**truth(3), "annotations": []}, tmp_path)
    assert np.isnan(results["bbox"]["AP"])


def test_scores_by_class_and_size(tmp_path: Path) -> None:
    """A half of the nuts is found, small and large; the bolts all are, but one box is too large."""
    content = truth(8, images=1)
    for annotation in content["annotations"][:2]:
        annotation["bbox"][2:], annotation["area"] = [100, 100], 10000
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    results = [{**annotation, "score": 0.9} for annotation in content["annotations"]]
    nuts = [result for result in results if result["category_id"] == 3]
    bolts = [result for result in results if result["category_id"] == 7]
    bolts[0] = {**bolts[0], "bbox": [*bolts[0]["bbox"][:3], 160]}  # IoU 0.625
    coco = load_truth("", str(path))
    score = score_results(nuts[:2] + bolts, coco, 100)["bbox"]  # type: ignore[arg-type]
    assert score.by_class.keys() == {"nut", "bolt"}
    nut, bolt = score.by_class["nut"], score.by_class["bolt"]
    half, third = 51 / 101 * 100, 34 / 101 * 100  # of the 101 recalls
    found = [nut[key] for key in ("AP", "APs", "APl")] + [bolt[key] for key in ("AP50", "APl")]
    assert found == pytest.approx([half, third, 100, 100, 30]) and np.isnan(nut["APm"])
    assert score.metrics["AP-nut"] == nut["AP"]
    assert score.metrics["AP"] == pytest.approx((nut["AP"] + bolt["AP"]) / 2)
