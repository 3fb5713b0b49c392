"""Images of a test set with their truth, and what a detector finds in them in COCO's format."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools.coco import COCO

from fpn_plugin.data.classes import adopt_classes, check_test_classes
from fpn_plugin.data.coco_format import needed_splits, register_own
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.evaluation.scores import load_truth
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.images import all_records

DATASET, NUM = "--dataset", "--num"
Predict = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # a model's input -> its output


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


def read_test_data(
    name: str, num: int | None, configs: Sequence[CfgNode], weights: str, flag: str = DATASET
) -> TestData:
    """Read some images of a dataset.

    Args:
        num: at most so many; None for all.
        configs: of the models; their `DATASETS.OWN` are registered for "own_val".
        weights: the checkpoint, whose classes must be the dataset's if it knows them.
        flag: that named the dataset, for messages.

    Raises:
        KeyError: if there is no such dataset.
        ValueError: if its classes are not the model's, or it has no truth by COCO's rules.
        FileNotFoundError: if its files are not there.
    """
    if not weights:
        raise ValueError(f"{flag} {name}: AP of random weights says nothing; give --weights")
    if num is not None and num < 1:
        raise ValueError(f"{NUM} {num} is not a number of images of 1 or more")
    own = [cfg for cfg in configs if cfg.DATASETS.OWN.VAL_JSON] if name == "own_val" else []
    if name == "own_val" and not own:
        raise ValueError(f"{flag} {name}: no config has a DATASETS.OWN.VAL_JSON")
    if len({cfg.DATASETS.OWN.VAL_JSON for cfg in own}) > 1:
        files = ", ".join(dict.fromkeys(cfg.DATASETS.OWN.VAL_JSON for cfg in own))
        raise ValueError(
            f"{flag} {name}: the configs have different test sets, which cannot be compared:"
            f" {files} (DATASETS.OWN.VAL_JSON)"
        )
    known = (own or list(configs))[-1].clone()
    known.defrost()
    adopt_classes(known, weights)
    register_own(known, needed=needed_splits(name))
    records = all_records(name, flag)
    check_test_classes(known, name)
    truth = load_truth(name)
    if isinstance(truth, str):
        raise ValueError(f"{flag} {name}: no AP without the truth: {truth}")
    count = len(records) if num is None else min(num, len(records))
    chosen = [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") or {}
    classes = [key for key, _ in sorted(ids.items(), key=lambda entry: entry[1])]
    return TestData(name, chosen, len(records), truth, classes or sorted(truth.getCatIds()))


def part_of(truth: COCO, images: Sequence[Any]) -> COCO:
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
def find_objects(
    predict: Predict, mapper: Mapper, data: TestData, name: str, bar: Bar, flag: str = DATASET
) -> list[dict[str, Any]] | None:
    """A model's detections in COCO's format; None if it gives none at all.

    Args:
        predict: the model, for one image.
        mapper: from a record to the model's input.
        name: of the model, for messages.
        flag: that named the dataset, for messages.

    Raises:
        ValueError: if it predicts a class that the dataset does not have.
    """
    results: list[dict[str, Any]] = []
    bar.begin(f"AP on {data.name}: {name}", len(data.records))
    for done, record in enumerate(data.records, 1):
        output = predict(mapper(dict(record)))
        if "instances" not in output:
            return None
        instances = output["instances"].to("cpu")
        instances.pred_boxes.tensor = instances.pred_boxes.tensor.float()
        instances.scores = instances.scores.float()
        for result in instances_to_coco_json(instances, record["image_id"]):
            if result["category_id"] >= len(data.classes):
                raise ValueError(
                    f"{flag} {data.name} has {len(data.classes)} classes, but {name}"
                    f" predicts class {result['category_id']}: it was trained on other data"
                )
            result.pop("keypoints", None)
            results.append({**result, "category_id": data.classes[result["category_id"]]})
        bar.step(done)
    return results
