"""What Detectron2 gets of a JSON file in COCO's format: dataset dicts, and the truth of a test set.

Detectron2's own loader and evaluator open the file by pycocotools, which takes UTF-8 alone and ids
as they are. Here ids, sizes and masks are mended as the checks say.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections import defaultdict
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from .classes import unique_names
from .coco_json import DatasetError, load_json, unify_ids
from .masks import usable_mask

__all__ = ["OWN_LOADER", "is_own_loader", "load_records", "mask_truth", "read_truth", "with_masks"]

OWN_LOADER = "loaded_by_fpn_plugin"

logger = logging.getLogger(__name__)


def is_own_loader(name: str) -> bool:
    """Whether a dataset's records come from :func:`load_records`."""
    return name in DatasetCatalog.list() and bool(MetadataCatalog.get(name).get(OWN_LOADER))


def load_records(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    """Detectron2's `load_coco_json`, for files and ids that it does not take.

    Other than there, an object without a usable mask is kept without ``segmentation``: a detector
    of boxes alone trains on it. :func:`with_masks` leaves it out for the others.

    Args:
        name: of the dataset, whose classes are written to its metadata.

    Raises:
        DatasetError: the file cannot be read, or an annotation's category is unknown.
    """
    content = load_json(json_file)
    unify_ids(content)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    ids = [category["id"] for category in categories]
    classes = {key: index for index, key in enumerate(ids)}
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = unique_names(ids, [category["name"] for category in categories])
    metadata.thing_dataset_id_to_contiguous_id = classes
    annotations = defaultdict(list)
    for annotation in content.get("annotations", []):
        annotations[annotation["image_id"]].append(annotation)
    images = {image["id"]: image for image in content["images"]}
    records = []
    for key in sorted(images):
        image = images[key]
        record = {"file_name": os.path.join(image_root, image["file_name"]), "image_id": key}
        record |= {"height": image["height"], "width": image["width"]}
        record["annotations"] = [
            _object(annotation, image, classes, json_file) for annotation in annotations[key]
        ]
        records.append(record)
    logger.info("Loaded %d images in COCO format from %s", len(records), json_file)
    return records


def _object(
    annotation: dict[str, Any], image: dict[str, Any], classes: dict[Any, int], json_file: str
) -> dict[str, Any]:
    category = annotation["category_id"]
    if category not in classes:
        raise DatasetError(
            f"{json_file}: annotation {annotation.get('id')}: category id {category} is unknown"
        )
    entry = {key: annotation[key] for key in ("iscrowd", "bbox") if key in annotation}
    entry |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": classes[category]}
    if mask := annotation.get("segmentation"):
        if usable := usable_mask(mask, image):
            entry["segmentation"] = usable
    if points := annotation.get("keypoints"):
        # indices of pixels, whose centres are meant; every third value is the visibility
        entry["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    return entry


def with_masks(records: list[dict[str, Any]], filter_empty: bool) -> list[dict[str, Any]]:
    """Leave out the objects that have no mask, for a model that needs one of every object.

    Args:
        records: Detectron2's dataset dicts, which are not changed.
        filter_empty: whether images that have no object any more are left out, too.
    """
    kept, lost = [], 0
    for record in records:
        annotations = record.get("annotations", [])
        good = [a for a in annotations if a.get("segmentation") or a.get("iscrowd", 0)]
        if len(good) < len(annotations):
            lost += len(annotations) - len(good)
            if filter_empty and all(annotation.get("iscrowd", 0) for annotation in good):
                continue
            record = {**record, "annotations": good}
        kept.append(record)
    if lost:
        logger.warning("%d objects are left out of training: they have no usable mask", lost)
    return kept


def read_truth(json_file: str) -> COCO:
    """The annotations of a file for pycocotools, with ids that it and its kin can take.

    Raises:
        DatasetError: the file cannot be read.
    """
    content = load_json(json_file)
    unify_ids(content)
    categories = content.get("categories", [])
    ids, names = ([category.get(key) for category in categories] for key in ("id", "name"))
    for category, name in zip(categories, unique_names(ids, names), strict=True):
        category["name"] = name
    return _truth(content)


def mask_truth(truth: COCO) -> COCO:
    """The truth for the AP of masks, in which pycocotools can read every mask.

    An object without a usable mask is ignored, as a crowd is: it needs no detection, and those in
    its box are not wrong.

    Returns:
        the truth that was given if nothing is wrong with it, else a changed copy.
    """
    annotations = truth.dataset.get("annotations", [])
    mended = [_with_mask(annotation, truth.imgs) for annotation in annotations]
    changed = [(new, old) for new, old in zip(mended, annotations, strict=True) if new is not old]
    if not changed:
        return truth
    if lost := sum(new.get("iscrowd") != old.get("iscrowd") for new, old in changed):
        logger.warning("AP of masks ignores %d objects that have no usable mask", lost)
    return _truth({**truth.dataset, "annotations": mended})


def _with_mask(annotation: dict[str, Any], images: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    mask, image = annotation.get("segmentation"), images.get(annotation["image_id"])
    if image is None:  # never evaluated
        return annotation
    usable = usable_mask(mask, image)
    if usable is not None:
        same = usable is mask or isinstance(mask, dict)
        return annotation if same else {**annotation, "segmentation": usable}
    region = _box_mask(annotation.get("bbox"), image)
    return {**annotation, "segmentation": region, "iscrowd": 1}


def _box_mask(box: Any, image: dict[str, Any]) -> dict[str, Any] | list[list[float]]:
    """The part of a box that lies in the image; nothing if it is no box."""
    width, height = image["width"], image["height"]
    nothing = {"size": [height, width], "counts": [height * width]}
    try:
        x, y, w, h = np.nan_to_num(np.asarray(box, float).reshape(4))
    except (TypeError, ValueError):
        return nothing
    x0, x1 = np.clip([x, x + w], 0, width).tolist()
    y0, y1 = np.clip([y, y + h], 0, height).tolist()
    return [[x0, y0, x1, y0, x1, y1, x0, y1]] if x1 > x0 and y1 > y0 else nothing


def _truth(content: dict[str, Any]) -> COCO:
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
