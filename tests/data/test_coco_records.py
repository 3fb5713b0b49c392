"""What Detectron2 and pycocotools get of a user's file: the same as from a plain one."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from coco_data import config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.cocoeval import COCOeval

from fpn_plugin.data import (
    DatasetError,
    check_config_datasets,
    check_dataset,
    register_coco_format,
    register_own,
)
from fpn_plugin.data.coco_records import mask_truth, read_truth
from fpn_plugin.engine.data import load_training_dicts
from fpn_plugin.evaluation.build import build_evaluator

Change = Callable[[dict[str, Any]], Any]
pytestmark = pytest.mark.usefixtures("registry")


def number_from_zero(content: dict[str, Any]) -> None:
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number


def share_an_id(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["id"] = 7


def to(kind: Callable[[int], Any], *keys: str) -> Change:
    """Change every value under these keys, such as "images.id"."""

    def apply(content: dict[str, Any]) -> None:
        for table, key in (key.split(".") for key in keys):
            for record in content[table]:
                record[key] = kind(record[key])

    return apply


IMAGE_IDS = ("images.id", "annotations.image_id")
CATEGORY_IDS = ("categories.id", "annotations.category_id")
ODD: dict[str, Change] = {
    "numbered from 0": number_from_zero,
    "one id for all": share_an_id,
    "negative ids": to(lambda key: -key, "annotations.id"),
    "huge ids": to(lambda key: key + 2**63, "annotations.id"),
    "ids as text": to(str, "annotations.id"),
    "ids as floats": to(float, "annotations.id", *IMAGE_IDS, *CATEGORY_IDS),
    "sizes as floats": to(float, "images.width", "images.height"),
    "images by text": to("frame_{}".format, *IMAGE_IDS),
    "images by text in one table": to(str, "annotations.image_id"),
    "images by negative numbers": to(lambda key: -key, *IMAGE_IDS),
    "images by huge numbers": to(lambda key: key + 2**70, *IMAGE_IDS),
    "categories by text": to(str, *CATEGORY_IDS),
    "categories by text in one table": to(str, "categories.id"),
    "no info": lambda content: content.pop("info", None),
}


def detections(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every object but the last, found exactly."""
    outputs = []
    for record in records:
        found = Instances((record["height"], record["width"]))
        annotations = record["annotations"]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes, found.scores = Boxes(boxes), torch.linspace(0.9, 0.8, len(boxes))
        found.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        outputs.append({"instances": found[: len(found) - (record is records[-1])]})
    return outputs


def evaluate(name: str, folder: Path, fast: bool = False) -> dict[str, float]:
    cfg = config(test=(name,))
    cfg.TEST.FAST_COCO_EVAL, cfg.TEST.SIZE_BINS = fast, [8, 12]
    records = sorted(DatasetCatalog.get(name), key=lambda record: record["file_name"])
    evaluator = build_evaluator(cfg, name, str(folder))
    evaluator.reset()
    evaluator.process(records, detections(records))
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("case", ODD)
def test_odd_ids_and_sizes_train_and_evaluate_as_plain_ones(
    case: str, sound: Any, write: Any, tmp_path: Path
) -> None:
    register_coco_format("plain", *write(sound))
    odd = copy.deepcopy(sound)
    ODD[case](odd)
    register_coco_format("odd", *write(odd, "odd.json"))
    for training in (True, False):
        check_dataset("odd", "full", training)
    plain, records = DatasetCatalog.get("plain"), DatasetCatalog.get("odd")
    records.sort(key=lambda record: record["file_name"])  # those of negative ids come reversed
    assert [{**record, "image_id": 0} for record in records] == [
        {**record, "image_id": 0} for record in plain
    ]
    assert [type(record["height"]) for record in records] == [int, int]
    results = evaluate("plain", tmp_path)
    assert 40 < results["AP"] < 100
    for fast in (False, True):
        if fast:
            pytest.importorskip("faster_coco_eval")
        assert evaluate("odd", tmp_path, fast) == pytest.approx(results, nan_ok=True)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in written} == {image["id"] for image in odd["images"]}


def test_records_are_those_of_detectron2(sound: Any, write: Any) -> None:
    annotations = sound["annotations"]
    annotations[0]["keypoints"] = [3, 4, 2, 0, 0, 0]
    annotations[1]["iscrowd"] = 1
    annotations[1]["segmentation"] = {"size": [48, 64], "counts": [48, 48, 48 * 62]}
    annotations[2]["segmentation"].append([1, 1, 2, 2])
    json_file, images = write(sound)
    register_coco_format("ours", json_file, images)
    expected = load_coco_json(json_file, images, "theirs")
    assert DatasetCatalog.get("ours") == expected
    ours, theirs = MetadataCatalog.get("ours"), MetadataCatalog.get("theirs")
    assert ours.thing_classes == theirs.thing_classes
    assert ours.thing_dataset_id_to_contiguous_id == theirs.thing_dataset_id_to_contiguous_id


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(encoding: str, sound: Any, write: Any, tmp_path: Path) -> None:
    sound["categories"][0]["name"] = "K\u00e4tzchen"
    json_file, images = write(sound)
    Path(json_file).write_text(json.dumps(sound, ensure_ascii=False), encoding=encoding)
    cfg = config(TRAIN_JSON=json_file, TRAIN_IMAGES=images, VAL_JSON=json_file, VAL_IMAGES=images)
    register_own(cfg)
    assert check_config_datasets(cfg)[0].classes == ("K\u00e4tzchen", "dog")
    assert evaluate("own_val", tmp_path)["AP"] > 40
    register_coco_instances("theirs", {}, json_file, images)
    with pytest.raises(DatasetError, match="own.json.*(.|\n)*save it as UTF-8, or register it"):
        check_dataset("theirs")


def test_latin_1_is_an_error_that_says_so(sound: Any, write: Any) -> None:
    sound["categories"][0]["name"] = "K\u00e4tzchen"
    json_file, images = write(sound)
    Path(json_file).write_text(json.dumps(sound, ensure_ascii=False), encoding="latin-1")
    register_coco_format("t", json_file, images)
    with pytest.raises(DatasetError, match="own.json: is not text in utf-8.*as UTF-8.*Latin-1"):
        check_dataset("t")


def test_classes_of_one_name_are_told_apart(sound: Any, write: Any, tmp_path: Path) -> None:
    for category in sound["categories"]:
        category["name"] = "bolt"
    register_coco_format("t", *write(sound))
    report = check_dataset("t")
    assert report.classes == ("bolt (id 1)", "bolt (id 2)")
    assert any("name another one has" in fault for fault in report.warnings)
    results = evaluate("t", tmp_path)
    assert results["AP-bolt (id 1)"] > results["AP-bolt (id 2)"]
    assert MetadataCatalog.get("t").thing_classes == list(report.classes)


def polygons(content: dict[str, Any], *masks: Any) -> None:
    for annotation, mask in zip(content["annotations"], masks):
        annotation["segmentation"] = mask


def drop_masks(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[]]


def crowd(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def test_a_detector_of_boxes_trains_without_usable_masks(
    sound: Any, write: Any, caplog: Any
) -> None:
    polygons(sound, [[]], [[1, 1]], {"size": [9, 9], "counts": [81]}, [[1e9, 1, 2, 2, 3, 3]])
    register_coco_format("t", *write(sound))
    cfg = config(("t",))
    check_config_datasets(cfg)
    records = load_training_dicts(cfg)
    assert [len(record["annotations"]) for record in records] == [2, 2]
    assert not any("segmentation" in a for record in records for a in record["annotations"])
    cfg.MODEL.MASK_ON, cfg.DATASETS.CHECK = True, "off"
    with pytest.raises(ValueError, match="DATASETS.TRAIN .'t',.*MODEL.MASK_ON"):
        load_training_dicts(cfg)
    polygons(sound, [[1, 1, 9, 1, 9, 9]])
    write(sound)
    with caplog.at_level(logging.WARNING, "fpn_plugin"):
        (record,) = load_training_dicts(cfg)
    assert len(record["annotations"]) == 1 and "3 objects are left out" in caplog.text


@pytest.mark.parametrize(
    "change, masks, message",
    [
        (crowd, False, "all 4 annotations are left out of training.*4 × iscrowd"),
        (drop_masks, True, "all 4 annotations are left out.*4 × no polygon has three points"),
        (to(lambda box: [9, 9, 0, 4], "annotations.bbox"), False, "4 × box of zero area"),
    ],
)
def test_a_dataset_without_an_object_to_learn(
    change: Change, masks: bool, message: str, sound: Any, write: Any
) -> None:
    change(sound)
    register_coco_format("t", *write(sound))
    cfg = config(("t",))
    cfg.MODEL.MASK_ON = masks
    with pytest.raises(DatasetError, match=f"DATASETS.TRAIN .'t',.*{message}"):
        check_config_datasets(cfg)
    if not masks:
        cfg.DATASETS.CHECK = "off"
        check_config_datasets(cfg)
        if change is crowd:
            with pytest.raises(ValueError, match="DATASETS.TRAIN.* 4 are crowds"):
                load_training_dicts(cfg)


def test_objects_that_training_leaves_out_are_counted(sound: Any, write: Any, caplog: Any) -> None:
    sound["annotations"][0]["iscrowd"] = 1
    polygons(sound, [[1, 1, 9, 1, 9, 9]], [[5, 5]])
    register_coco_format("t", *write(sound))
    with caplog.at_level(logging.WARNING, "fpn_plugin"):
        report = check_dataset("t", masks=True)
    assert sum(report.left_out.values()) == 2
    assert "2 of 4 annotations are left out of training: 1 × iscrowd" in caplog.text


BAD_MASKS = {
    "a point": [[10, 10]],
    "a line": [[10, 10, 20, 20]],
    "an odd number": [[1, 1, 2, 2, 3, 3, 4]],
    "nothing": [[]],
    "nothing and a point": [[], [10, 10]],
    "far outside": [[1e8, 1, 2, 2, 3, 3]],
    "no list": None,
    "wrong RLE": {"size": [5, 5], "counts": [25]},
}


@pytest.mark.parametrize("case", BAD_MASKS)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_ap_of_masks_ignores_an_object_without_one(
    case: str, mixed: bool, sound: Any, write: Any
) -> None:
    good = sound["annotations"][1]["segmentation"][0]
    bad = BAD_MASKS[case]
    if mixed:
        if not isinstance(bad, list):
            pytest.skip("one mask is either polygons or RLE")
        bad = [*bad, good]
    sound["annotations"][1]["segmentation"] = bad
    truth = mask_truth(read_truth(write(sound)[0]))
    found = []
    for annotation in truth.dataset["annotations"]:
        rle = truth.annToRLE(annotation)
        found.append({**{key: annotation[key] for key in ("image_id", "category_id")}, "score": 1})
        found[-1]["segmentation"] = rle
    found = found if mixed else found[:1] + found[2:]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)
    assert truth.anns[2].get("iscrowd") == (0 if mixed else 1)
    assert np.isclose(mask_util.area(truth.annToRLE(truth.anns[2])), 120, atol=2)


def test_short_polygons_of_a_test_set_are_told_before_training(sound: Any, write: Any) -> None:
    sound["annotations"][1]["segmentation"] = [[10, 10]]
    register_coco_format("t", *write(sound))
    cfg = config(test=("t",))
    cfg.MODEL.MASK_ON = True
    (report,) = check_config_datasets(cfg)
    assert any("AP of masks ignores the object" in fault for fault in report.warnings)
    drop_masks(sound)
    write(sound)
    with pytest.raises(DatasetError, match="none of the 4 annotations has a polygon"):
        check_config_datasets(cfg)


def test_wrong_masks_matter_only_where_they_are_read(sound: Any, write: Any) -> None:
    sound["annotations"][0]["segmentation"] = {"size": [64, 48], "counts": [64 * 48]}
    json_file, images = write(sound)
    register_coco_format("t", json_file, images)
    assert any("nobody reads it" in fault for fault in check_dataset("t").warnings)
    with pytest.raises(DatasetError, match="annotation 1 .*is RLE of size"):
        check_dataset("t", masks=True)
    register_coco_instances("theirs", {}, json_file, images)  # whose loader reads them
    with pytest.raises(DatasetError, match="annotation 1 .*is RLE of size"):
        check_dataset("theirs")


def test_detectron2s_loader_needs_ids_of_annotations(sound: Any, write: Any) -> None:
    number_from_zero(sound)
    json_file, images = write(sound)
    register_coco_instances("theirs", {}, json_file, images)
    assert check_dataset("theirs", evaluation=True).num_annotations == 4
    share_an_id(sound)
    write(sound)
    with pytest.raises(DatasetError, match="annotation 7 .*4 share its id"):
        check_dataset("theirs")
