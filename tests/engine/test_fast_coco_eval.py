"""COCO's metrics by faster-coco-eval against pycocotools', and the evaluator against Detectron2's."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from detectron2.structures import Boxes, Instances
from prepare_scenes import CLASSES, SceneOptions, draw_scene
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scene_data import POINTS, extreme_points

from fpn_plugin.evaluation.build import (
    InstanceEvaluator,
    build_evaluator,
    check_evaluators,
    coco_eval_class,
)

TASKS = ("bbox", "segm", "keypoints")
OPTIONS = SceneOptions(
    width=160, height=128, min_size=8, max_size=120, min_objects=3, max_objects=8
)
# one category, and one image, that nothing is in
CATEGORIES = [{"id": 2 * i + 3, "name": name} for i, name in enumerate((*CLASSES, "nothing"))]
TOLERANCE = 1e-12
MakeConfig = Callable[..., CfgNode]
Shapes = list[tuple[np.ndarray, int, np.ndarray]]
"""The objects of an image: mask, number of the category, keypoints `(K, 3)`."""


def shapes(seed: int, index: int) -> Shapes:
    scene = draw_scene(SceneOptions(**{**vars(OPTIONS), "seed": seed}), "val", index)
    masks = [scene.mask(number) for number in range(len(scene.classes))]
    places = [np.reshape(extreme_points(mask), (-1, 3)).astype(float) for mask in masks]
    return list(zip(masks, map(int, scene.classes), places))


def counts(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths, as crowds have them: the first run is of zeros."""
    runs = [(key, len(list(run))) for key, run in itertools.groupby(mask.flatten(order="F"))]
    return {"size": list(mask.shape), "counts": [0] * int(runs[0][0]) + [n for _, n in runs]}


def truth(drawn: list[Shapes], rng: np.random.Generator) -> dict[str, Any]:
    """COCO's JSON; every fifth object or so is a crowd, or has no keypoint that is seen."""
    annotations: list[dict[str, Any]] = []
    for image, (mask, category, points) in ((i, s) for i, all_ in enumerate(drawn) for s in all_):
        crowd, seen = rng.random() < 0.2, rng.random() > 0.2
        rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        points = np.where(seen, points, 0)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image + 1,
                "category_id": CATEGORIES[category]["id"],
                "iscrowd": int(crowd),
                "bbox": mask_util.toBbox(rle).tolist(),
                "area": float(mask_util.area(rle)),
                "segmentation": (
                    counts(mask) if crowd else {**rle, "counts": rle["counts"].decode()}
                ),
                "keypoints": points.ravel().tolist(),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            }
        )
    size = {"height": OPTIONS.height, "width": OPTIONS.width}
    images = [{"id": i + 1, "file_name": f"{i}.png", **size} for i in range(len(drawn))]
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


def detections(drawn: Shapes, rng: np.random.Generator) -> Instances:
    """None to three for each object, more or less beside it; every tenth of another category."""
    objects = []
    for mask, category, points in drawn:
        for scale in rng.uniform(0, 12, rng.integers(0, 4)):
            dy, dx = rng.normal(0, scale, 2).round().astype(int)
            moved = np.roll(mask, (dy, dx), (0, 1))
            moved &= rng.random(mask.shape) > rng.choice([0, 0.2])
            if not moved.any():
                continue
            rows, columns = np.nonzero(moved)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            places = points + rng.normal(0, scale, points.shape) * [1, 1, 0]
            other = int(rng.integers(len(CATEGORIES)))
            # some scores are equal
            score = float(rng.random().__round__(1 if rng.random() < 0.5 else 9))
            label = other if rng.random() < 0.1 else category
            objects.append((moved, box, places, label, score))
    result = Instances((OPTIONS.height, OPTIONS.width))
    masks, boxes, places, classes, scores = zip(*objects) if objects else ([], [], [], [], [])
    result.pred_masks = torch.tensor(np.array(masks)).reshape(-1, OPTIONS.height, OPTIONS.width)
    result.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4))
    result.pred_keypoints = torch.tensor(np.array(places), dtype=torch.float32).reshape(
        -1, len(POINTS), 3
    )
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    result.scores = torch.tensor(scores, dtype=torch.float64)
    return result


@pytest.fixture(params=range(2))
def scenes(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A registered dataset's name, and the outputs for it as Detectron2 has them."""
    rng = np.random.default_rng(request.param)
    drawn = [shapes(request.param, index) if index != 1 else [] for index in range(6)]
    name, path = "fast_coco_eval", tmp_path / "truth.json"
    path.write_text(json.dumps(truth(drawn, rng)))
    register_coco_instances(name, {}, str(path), str(tmp_path))
    DatasetCatalog.get(name)  # sets the mapping of categories
    drawn[2] = []  # nothing is found in it
    yield name, [{"instances": detections(one, rng)} for one in drawn]
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluate(evaluator: COCOEvaluator, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    evaluator.reset()
    for number, output in enumerate(copy.deepcopy(outputs), 1):  # it moves keypoints in place
        evaluator.process([{"image_id": number}], [output])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def arrays(cocoeval: type[COCOeval], path: str, results: str, task: str) -> dict[str, np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco, detected = COCO(path), json.loads(Path(results).read_text())
        for result in detected if task == "segm" else []:
            del result["bbox"]
        evaluation = cocoeval(coco, coco.loadRes(detected), task)
        if task == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.full(len(POINTS), 0.1)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision, recall = (evaluation.eval[key] for key in ("precision", "recall"))
    return {"stats": evaluation.stats, "precision": precision, "recall": recall}


def test_the_metrics_are_those_of_detectron2(
    scenes: Any, make_config: MakeConfig, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    name, outputs = scenes
    cfg = make_config(TEST__FAST_COCO_EVAL=True, TEST__KEYPOINT_OKS_SIGMAS=[0.1] * len(POINTS))
    fast = build_evaluator(cfg, name, str(tmp_path / "fast"))
    theirs = COCOEvaluator(name, output_dir=str(tmp_path / "theirs"), kpt_oks_sigmas=[0.1] * 4)
    expected = evaluate(theirs, outputs)
    log.clear()
    results = evaluate(fast, outputs)
    assert list(results) == list(expected) == sorted(TASKS)
    for task in TASKS:
        assert f"Evaluation results for {task}:" in log.text
        assert f"Per-category {task} AP:" in log.text
        assert list(results[task]) == list(expected[task])
        assert f"AP-{CLASSES[0]}" in results[task] and 0 < results[task]["AP"] < 100
        values = (list(of_task[task].values()) for of_task in (results, expected))
        np.testing.assert_allclose(*values, rtol=0, atol=TOLERANCE * 100)
    # and everything that they average: every category, range of areas and number of detections
    path, file = MetadataCatalog.get(name).json_file, "coco_instances_results.json"
    assert (tmp_path / "fast" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    for task in TASKS:
        one, two = (
            arrays(cocoeval, path, str(tmp_path / "fast" / file), task)
            for cocoeval in (coco_eval_class(cfg), COCOeval)
        )
        for key in two:
            np.testing.assert_allclose(one[key], two[key], rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("scenes", [0], indirect=True)
@pytest.mark.parametrize("fast", [False, True])
def test_options_of_detectron2s_evaluator(
    fast: bool, scenes: Any, make_config: MakeConfig, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    name, outputs = scenes
    cocoeval = coco_eval_class(make_config(TEST__FAST_COCO_EVAL=fast))
    assert (cocoeval is COCOeval_opt) == (not fast)

    def both(**options: Any) -> tuple[InstanceEvaluator, COCOEvaluator]:
        folder = str(tmp_path / "out")
        ours = InstanceEvaluator(name, output_dir=folder, cocoeval=cocoeval, **options)
        return ours, COCOEvaluator(name, output_dir=folder, **options)

    options = {"tasks": ("segm", "bbox"), "max_dets_per_image": 3}
    results, expected = (evaluate(evaluator, outputs) for evaluator in both(**options))
    assert list(results) == list(expected) == ["bbox", "segm"]
    for task in results:
        assert results[task] == pytest.approx(expected[task], abs=1e-10, nan_ok=True)
    empty = [{"instances": output["instances"][:0]} for output in outputs]
    results, expected = (evaluate(evaluator, empty) for evaluator in both())
    assert str(results) == str(expected) and list(results) == ["bbox"]
    assert np.isnan(results["bbox"]["AP"])
    assert "No predictions from the model!" in log.text
    ours, theirs = both()
    ours._do_evaluation = theirs._do_evaluation = False
    assert evaluate(ours, outputs) == evaluate(theirs, outputs) == {}
    log.clear()
    evaluate(both()[0], outputs[:0])
    assert "Did not receive valid predictions" in log.text


def test_without_the_package(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    cfg = make_config(TEST__FAST_COCO_EVAL=True)
    text = r"TEST.FAST_COCO_EVAL: True .* pip install 'fpn_plugin\[fast_eval\]'"
    for check in (check_evaluators, coco_eval_class):
        with pytest.raises(ImportError, match=text):
            check(cfg)
    cfg.TEST.FAST_COCO_EVAL = False
    check_evaluators(cfg)
    assert coco_eval_class(cfg) is COCOeval_opt
