"""Checks of a COCO JSON file that need no picture. A million annotations take a few seconds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from .findings import DatasetError, Findings

__all__ = ["check_annotations", "check_categories", "check_images", "image_file_name", "read_json"]

_DROPPED = "Detectron2 leaves it out of training"
_BORDER_TOLERANCE = 1.0


def read_json(path: str) -> dict[str, Any]:
    """Read a COCO JSON file.

    Raises:
        DatasetError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DatasetError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DatasetError(f"{path}: holds a JSON {kind}, but COCO's format is an object")
    return content


def read_records(content: dict[str, Any], key: str, findings: Findings) -> list[dict[str, Any]]:
    """Return the records under a key; an absent key, or another type, is an error."""
    records = content.get(key)
    if not isinstance(records, list):
        found = "is missing" if key not in content else f"is a {type(records).__name__}"
        findings.error(f"{key!r} {found}, but must be a list of objects")
        return []
    wrong = [i for i, record in enumerate(records) if not isinstance(record, dict)]
    for index in wrong:
        findings.error(f"{key}[{index}] is a {type(records[index]).__name__}, not an object")
    return [record for record in records if isinstance(record, dict)] if wrong else records


def _integers(
    records: list[dict[str, Any]], table: str, keys: tuple[str, ...], findings: Findings
) -> list[dict[str, Any]]:
    """Return the records whose values under all keys are integers; the others are errors."""
    good = []
    for index, record in enumerate(records):
        for key in keys:
            if type(record.get(key)) is not int:  # not isinstance: JSON's true is no id
                value = repr(record[key]) if key in record else "missing"
                where = f"{table}[{index}] (id {record.get('id')!r})"
                findings.error(f"{where}: {key!r} is {value}, but must be an integer")
                break
        else:
            good.append(record)
    return good


def _duplicates(records: list[dict[str, Any]]) -> dict[int, int]:
    counts = Counter(record["id"] for record in records)
    return {key: count for key, count in counts.items() if count > 1}


def check_categories(content: dict[str, Any], findings: Findings) -> dict[int, str]:
    """Check ``categories`` and return their names by id."""
    categories = _integers(
        read_records(content, "categories", findings), "categories", ("id",), findings
    )
    for key, count in _duplicates(categories).items():
        findings.error(f"category id {key} is used {count} times")
    for category in categories:
        if not isinstance(category.get("name"), str):
            findings.error(f"category id {category['id']} has no 'name'")
    if not categories and content.get("categories") == []:
        findings.error("'categories' is empty")
    return {category["id"]: str(category.get("name")) for category in categories}


def image_file_name(image: dict[str, Any]) -> str | None:
    """Return an image's path below the image folder."""
    name = image.get("file_name")
    return name if isinstance(name, str) and name else None


def check_images(content: dict[str, Any], findings: Findings) -> dict[int, dict[str, Any]]:
    """Check ``images`` and return those that are sound by id."""
    keys = ("id", "width", "height")
    images = _integers(read_records(content, "images", findings), "images", keys, findings)
    if content.get("images") == []:
        findings.error("the dataset is empty: 'images' has no entry")
    for key, count in _duplicates(images).items():
        findings.error(f"image id {key} is used {count} times")
    for image in images:
        name = image_file_name(image)
        where = f"image {name!r} (id {image['id']})"
        if name is None:
            findings.error(f"image id {image['id']} has no 'file_name'")
        elif _escapes(name):
            findings.error(f"{where}: 'file_name' must stay below the image folder")
        if min(image["width"], image["height"]) < 1:
            findings.error(f"{where}: its size is {image['width']} x {image['height']} in the JSON")
    return {image["id"]: image for image in images}


def _escapes(name: str) -> bool:
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def check_annotations(
    content: dict[str, Any],
    images: dict[int, dict[str, Any]],
    categories: dict[int, str],
    findings: Findings,
    masks: bool = False,
    evaluation: tuple[str, ...] = (),
) -> int:
    """Check ``annotations`` and return how many there are.

    Args:
        content: the JSON file's.
        images: the sound images by id.
        categories: the names of the categories by id.
        findings: where faults are noted.
        masks: whether the model has a mask head, which every annotation must have a mask for.
        evaluation: the keys that an evaluation reads from every annotation.
    """
    annotations = read_records(content, "annotations", findings)
    if content.get("annotations") == []:
        findings.error("the dataset is empty: 'annotations' has no entry")
    keys = ("id", "image_id", "category_id")
    sound = _integers(annotations, "annotations", keys, findings)
    _check_ids(sound, images, categories, findings)
    _check_boxes([a for a in sound if a["image_id"] in images], images, findings)
    _check_masks(sound, images, masks, findings)
    _check_evaluation(sound, images, evaluation, findings)
    return len(annotations)


def _label(annotation: dict[str, Any], images: dict[int, dict[str, Any]]) -> str:
    image = images.get(annotation["image_id"])
    where = f"image {image_file_name(image)!r}" if image else f"image id {annotation['image_id']}"
    return f"annotation {annotation['id']} ({where})"


def _check_ids(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    categories: dict[int, str],
    findings: Findings,
) -> None:
    duplicates = _duplicates(annotations)
    for annotation in annotations:
        key = annotation["id"]
        if key == 0:
            findings.error(
                f"{_label(annotation, images)}: its id is 0, which pycocotools takes for 'not "
                "matched', so that AP comes out too low: number annotations from 1"
            )
        if key in duplicates:
            findings.error(f"{_label(annotation, images)}: {duplicates.pop(key)} share its id")
        if annotation["image_id"] not in images:
            findings.error(
                f"annotation {key}: image id {annotation['image_id']} is unknown "
                "(no sound entry in 'images')"
            )
        if annotation["category_id"] not in categories:
            known = ", ".join(map(str, sorted(categories)[:20])) or "none"
            findings.error(
                f"{_label(annotation, images)}: category id {annotation['category_id']} is "
                f"unknown; known ids: {known}{', …' if len(categories) > 20 else ''}"
            )
        if annotation.get("ignore"):
            findings.error(f"{_label(annotation, images)}: Detectron2 does not support 'ignore'")


def _check_boxes(
    annotations: list[dict[str, Any]], images: dict[int, dict[str, Any]], findings: Findings
) -> None:
    sound, boxes, sizes = [], [], []
    for annotation in annotations:
        box = annotation.get("bbox")
        if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box):
            image = images[annotation["image_id"]]
            sound.append(annotation)
            boxes.append(box)
            sizes.append((image["width"], image["height"]))
        else:
            value = repr(box) if "bbox" in annotation else "missing"
            findings.error(
                f"{_label(annotation, images)}: 'bbox' is {value}, but must be four numbers "
                "[x, y, width, height]"
            )
    if not sound:
        return
    for kind, wrong in _box_faults(np.array(boxes, float), np.array(sizes, float)).items():
        hits = np.flatnonzero(wrong)

        def describe(i: int, hits: np.ndarray = hits) -> str:
            hit = hits[i]
            width, height = (int(v) for v in sizes[hit])
            box = boxes[hit]
            return f"{_label(sound[hit], images)}: bbox {box}, image {width} x {height}"

        findings.warn(kind, len(hits), describe)


def _box_faults(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Return by kind which of the boxes ``(N, 4)``, as x, y, width, height, have a fault."""
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        low, extent = boxes[:, :2], boxes[:, 2:]
        high = low + extent
        negative = finite & (extent < 0).any(axis=1)
        empty = finite & ~negative & (extent == 0).any(axis=1)
        solid = finite & ~negative & ~empty
        outside = solid & ((high <= 0) | (low >= sizes)).any(axis=1)
        over = (low < -_BORDER_TOLERANCE) | (high > sizes + _BORDER_TOLERANCE)
        clipped = solid & ~outside & over.any(axis=1)
    return {
        f"box that is not finite ({_DROPPED})": ~finite,
        f"box of negative size ({_DROPPED})": negative,
        f"box of zero area ({_DROPPED})": empty,
        f"box outside the image ({_DROPPED})": outside,
        "box that reaches over the image's border (Detectron2 clips it)": clipped,
    }


def _check_masks(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    required: bool,
    findings: Findings,
) -> None:
    short: list[dict[str, Any]] = []
    for annotation in annotations:
        shape = annotation.get("segmentation")
        if isinstance(shape, list) and shape:
            lengths = [len(part) if isinstance(part, list) else 0 for part in shape]
            if any(length < 6 or length % 2 for length in lengths):
                short.append(annotation)
        elif shape and not (isinstance(shape, dict) and {"counts", "size"} <= set(shape)):
            findings.error(
                f"{_label(annotation, images)}: 'segmentation' must be a list of polygons, or RLE "
                "with 'counts' and 'size'"
            )
        elif not shape and required:
            findings.error(
                f"{_label(annotation, images)}: has no 'segmentation', but MODEL.MASK_ON is True"
            )
    kind = "polygon of under three points or an odd number of values (Detectron2 drops it)"
    findings.warn(kind, len(short), lambda i: _label(short[i], images))


def _check_evaluation(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    keys: tuple[str, ...],
    findings: Findings,
) -> None:
    """Find what would end an evaluation, after all the training, in a ``KeyError``."""
    rules = {"area": "a number", "iscrowd": "0 or 1"}
    for annotation in annotations:
        for key in keys:
            value = annotation.get(key)
            good = type(value) in (int, float) if key == "area" else value in (0, 1)
            if not good:
                found = repr(value) if key in annotation else "missing"
                findings.error(
                    f"{_label(annotation, images)}: {key!r} is {found}, but must be {rules[key]}: "
                    "the evaluation of a dataset in DATASETS.TEST reads it"
                )
