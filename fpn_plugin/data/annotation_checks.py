"""Checks of a COCO JSON file that open no image. A million annotations take a few seconds.

One pass over a value of all records finds out whether it is right everywhere; only if it is not are
the records checked one by one.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any, Iterable

import numpy as np

from .classes import unique_names
from .coco_json import EXAMPLES_SHOWN, NO_POLYGON, Findings, Polygons
from .image_checks import image_file_name, name_fault
from .masks import far_coordinate, run_length_fault
from .unit_checks import check_units

__all__ = [
    "check_annotations",
    "check_categories",
    "check_images",
    "BORDER_TOLERANCE",
    "label",
]

_DROPPED = "Detectron2 leaves it out of training"
BORDER_TOLERANCE = 1.0
# What an evaluation reads of an annotation: what it must be, and what is taken if it is missing
_EVALUATED = {"area": ("a number", "that of its mask or box"), "iscrowd": ("0 or 1", "0")}
_LARGEST = 2**53  # JSON's integers have no bound, those of tensors do
_MOST_PIXELS = 2**32  # pycocotools counts them in 32 bits


def _read_records(content: dict[str, Any], key: str, findings: Findings) -> list[dict[str, Any]]:
    """Return the records under a key; an absent key, or another type, is an error."""
    records = content.get(key)
    if not isinstance(records, list):
        fault = "is missing" if key not in content else f"is a {type(records).__name__}"
        findings.error(f"{key!r} {fault}, but must be a list of objects")
        return []
    wrong = [i for i, record in enumerate(records) if not isinstance(record, dict)]
    for index in wrong:
        findings.error(f"{key}[{index}] is a {type(records[index]).__name__}, not an object")
    return [record for record in records if isinstance(record, dict)] if wrong else records


def _with_ids(
    records: list[dict[str, Any]],
    table: str,
    keys: tuple[str, ...],
    findings: Findings,
    integers: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Return the records whose values are integers or, under ``keys``, text; others are errors."""
    good = records
    for key in keys + integers:
        wanted, rule = ({int}, "an integer") if key in integers else ({int, str}, "a whole number")
        if _types(record.get(key) for record in records) <= wanted:
            continue
        rule += "" if key in integers else " or text"
        for index, record in enumerate(records):
            if type(record.get(key)) not in wanted:  # not isinstance: JSON's true is no id
                value = repr(record[key]) if key in record else "missing"
                where = f"{table}[{index}] (id {record.get('id')!r})"
                findings.error(f"{where}: {key!r} is {value}, but must be {rule}")
        good = [record for record in good if type(record.get(key)) in wanted]
    return good


def _with_one_type(
    records: list[dict[str, Any]], table: str, findings: Findings
) -> list[dict[str, Any]]:
    """Return the records if their ids can be put in order; numbers among text are an error."""
    if len(_types(record["id"] for record in records)) < 2:
        return records
    text = next(record["id"] for record in records if type(record["id"]) is str)
    number = next(record["id"] for record in records if type(record["id"]) is int)
    findings.error(
        f"{table!r}: some ids are numbers and some are text, such as {number} and {text!r}: write"
        " all in one form"
    )
    return [record for record in records if type(record["id"]) is int]


def _types(values: Iterable[Any]) -> set[type]:
    return set(map(type, values))


def _duplicates(records: list[dict[str, Any]]) -> dict[Any, int]:
    counts = Counter(record["id"] for record in records)
    return {key: count for key, count in counts.items() if count > 1}


def check_categories(content: dict[str, Any], findings: Findings) -> dict[int, str]:
    """Check ``categories`` and return their names by id, each name once (`unique_names`)."""
    records = _read_records(content, "categories", findings)
    categories = _with_ids(records, "categories", ("id",), findings)
    categories = _with_one_type(categories, "categories", findings)
    for key, count in _duplicates(categories).items():
        findings.error(f"category id {key} is used {count} times")
    for category in categories:
        name = category.get("name")
        if not isinstance(name, str) or not name.strip():
            given = f", but {name!r}" if "name" in category else ""
            findings.error(f"category id {category['id']} has no 'name' that is text{given}")
    if not categories and content.get("categories") == []:
        findings.error("'categories' is empty")
    ids = [category["id"] for category in categories]
    names = [str(category.get("name")) for category in categories]
    unique = unique_names(ids, names)
    changed = [i for i, name in enumerate(names) if unique[i] != name]
    findings.warn(
        "category whose name another one has, too (their AP could not be told apart, so that the"
        " id is added to the name)",
        len(changed),
        lambda i: f"{names[changed[i]]!r} becomes {unique[changed[i]]!r}",
    )
    return dict(zip(ids, unique))


def check_images(
    content: dict[str, Any], findings: Findings, outside: bool = False
) -> dict[int, dict[str, Any]]:
    """Check ``images`` and return the valid ones by id.

    Args:
        outside: whether they may name files outside of the image folder.
    """
    records = _read_records(content, "images", findings)
    images = _with_ids(records, "images", ("id",), findings, ("width", "height"))
    images = _with_one_type(images, "images", findings)
    if content.get("images") == []:
        findings.error("the dataset is empty: 'images' has no entry")
    for key, count in _duplicates(images).items():
        findings.error(f"image id {key} is used {count} times")
    for image in images:
        name = image_file_name(image)
        where = f"image {name!r} (id {image['id']})"
        if name is None:
            findings.error(f"image id {image['id']} has no 'file_name'")
        elif fault := name_fault(name, outside):
            findings.error(f"{where}: 'file_name' {fault}")
        if min(image["width"], image["height"]) < 1:
            findings.error(f"{where}: its size is {image['width']} x {image['height']} in the JSON")
        elif image["width"] * image["height"] >= _MOST_PIXELS:
            size = f"{image['width']} x {image['height']}"
            findings.error(f"{where}: its size is {size} in the JSON, too large for any tool")
    return {image["id"]: image for image in images}


def check_annotations(
    content: dict[str, Any],
    images: dict[int, dict[str, Any]],
    categories: dict[int, str],
    findings: Findings,
    masks: bool = False,
    evaluation: tuple[str, ...] = (),
    polygons: bool = False,
    training: bool = True,
    own: bool = True,
) -> int:
    """Check ``annotations`` and return how many there are.

    Args:
        content: the JSON file's.
        images: the valid images by id.
        categories: the names of the categories by id.
        findings: where faults are noted.
        masks: whether the model has a mask head, so that every annotation needs a mask.
        evaluation: the keys that an evaluation reads from every annotation.
        polygons: whether training accepts masks as polygons only.
        training: whether the annotations are trained on.
        own: whether the loader and the evaluator are ours, which mend what Detectron2's do not.
    """
    annotations = _read_records(content, "annotations", findings)
    if content.get("annotations") == []:
        findings.error("the dataset is empty: 'annotations' has no entry")
    keys = ("id", "image_id", "category_id")
    valid = _with_ids(annotations, "annotations", keys, findings)
    _check_ids(valid, images, categories, findings)
    _check_annotation_ids(valid, images, bool(evaluation), "iscrowd" in evaluation, own, findings)
    if training:
        crowds = [a for a in valid if (a.get("iscrowd") or 0) != 0]
        findings.leave_out("iscrowd is not 0 (CVAT's brush masks are written so)", crowds)
    _check_boxes([a for a in valid if a["image_id"] in images], images, masks, findings)
    _check_masks(valid, images, masks, polygons, training, own, findings)
    _check_keypoints(valid, images, findings)
    _check_evaluation(valid, images, evaluation, findings)
    return len(annotations)


def label(annotation: dict[str, Any], images: dict[int, dict[str, Any]]) -> str:
    """How messages name an annotation: by its id and its image's file."""
    image = images.get(annotation["image_id"])
    where = f"image {image_file_name(image)!r}" if image else f"image id {annotation['image_id']}"
    return f"annotation {annotation['id']} ({where})"


def _check_ids(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    categories: dict[int, str],
    findings: Findings,
) -> None:
    """Check that annotations are of images and categories that exist, and not to be ignored."""
    if (
        {annotation["image_id"] for annotation in annotations} <= images.keys()
        and {annotation["category_id"] for annotation in annotations} <= categories.keys()
        and all(annotation.get("ignore", 0) == 0 for annotation in annotations)
    ):
        return
    for annotation in annotations:
        if annotation["image_id"] not in images:
            findings.error(
                f"annotation {annotation['id']}: image id {annotation['image_id']} is unknown "
                "(no sound entry in 'images')"
            )
        if annotation["category_id"] not in categories:
            known = ", ".join(map(str, sorted(categories)[:20])) or "none"
            findings.error(
                f"{label(annotation, images)}: category id {annotation['category_id']} is "
                f"unknown; known ids: {known}{', …' if len(categories) > 20 else ''}"
            )
        if annotation.get("ignore", 0) != 0:
            findings.error(f"{label(annotation, images)}: Detectron2 does not support 'ignore'")


def _check_annotation_ids(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    evaluated: bool,
    numbered: bool,
    own: bool,
    findings: Findings,
) -> None:
    """Check the ids of the annotations themselves, which mean nothing but "this object".

    Args:
        evaluated: whether AP is computed from them.
        numbered: whether our evaluator does it, which numbers them anew.
        own: whether our loader reads them, which does not need them.
    """
    ids = {annotation["id"] for annotation in annotations}
    unique, numbers = len(ids) == len(annotations), _types(ids) <= {int}
    if unique and numbers and (not ids or min(ids) > 0):
        return
    duplicates = {} if unique else _duplicates(annotations)
    shared = [annotation for annotation in annotations if annotation["id"] in duplicates]
    if not own or (evaluated and not numbered):
        for annotation in shared:
            if count := duplicates.pop(annotation["id"], 0):
                findings.error(f"{label(annotation, images)}: {count} share its id")
    else:
        fault = "annotation that shares its id with another one (nothing needs it)"
        findings.warn(fault, len(shared), lambda i: label(shared[i], images))
    if not evaluated:
        return
    odd = [a for a in annotations if type(a["id"]) is not int or a["id"] < 1]
    if numbered:
        fault = "annotation id that is not above 0 (numbered anew in memory for the evaluation)"
        findings.warn(fault, len(odd), lambda i: label(odd[i], images))
        return
    for annotation in odd:
        findings.error(
            f"{label(annotation, images)}: its id is {annotation['id']!r}, but must be a number"
            " above 0: the lvis package takes 0 for 'not matched', so that AP comes out too low"
        )


def _check_boxes(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    masks: bool,
    findings: Findings,
) -> None:
    valid = _with_boxes(annotations, images, findings)
    if not valid:
        return
    boxes = [annotation["bbox"] for annotation in valid]
    sizes = [images[annotation["image_id"]] for annotation in valid]
    flat = np.fromiter(chain.from_iterable(boxes), float, 4 * len(boxes)).reshape(-1, 4)
    widths = np.fromiter((size["width"] for size in sizes), float, len(sizes))
    heights = np.fromiter((size["height"] for size in sizes), float, len(sizes))
    image_sizes = np.stack([widths, heights], axis=1)
    check_units(flat, image_sizes, valid, masks, findings, lambda i: label(valid[i], images))
    for fault, wrong in _box_faults(flat, image_sizes).items():
        hits = np.flatnonzero(wrong)

        def describe(i: int, hits: np.ndarray = hits) -> str:
            hit = hits[i]
            size = f"{sizes[hit]['width']} x {sizes[hit]['height']}"
            return f"{label(valid[hit], images)}: bbox {boxes[hit]}, image {size}"

        findings.warn(fault, len(hits), describe)
        if fault.endswith(f"({_DROPPED})"):
            findings.leave_out(fault.removesuffix(f" ({_DROPPED})"), (valid[hit] for hit in hits))


def _with_boxes(
    annotations: list[dict[str, Any]], images: dict[int, dict[str, Any]], findings: Findings
) -> list[dict[str, Any]]:
    """Return the annotations whose ``bbox`` is four numbers; the others are errors."""
    boxes = [annotation.get("bbox") for annotation in annotations]
    if _types(boxes) <= {list}:
        numbers = list(chain.from_iterable(boxes))  # type: ignore[arg-type]
        if set(map(len, boxes)) <= {4} and _types(numbers) <= {int, float}:  # type: ignore
            if max(numbers, default=0) < _LARGEST and min(numbers, default=0) > -_LARGEST:
                return annotations
    valid = []
    for annotation, box in zip(annotations, boxes):
        if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
            valid.append(annotation)
        else:
            value = repr(box) if "bbox" in annotation else "missing"
            findings.error(
                f"{label(annotation, images)}: 'bbox' is {value}, but must be four numbers "
                "[x, y, width, height]"
            )
    return valid


def _is_number(value: Any) -> bool:
    """Whether a tensor can hold the value, infinity and nan included."""
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _box_faults(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each fault which of the boxes ``(N, 4)``, as x, y, width, height, have it.

    Args:
        sizes: width and height of each box's image, ``(N, 2)``.
    """
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        low, extent = boxes[:, :2], boxes[:, 2:]
        high = low + extent
        negative = finite & (extent < 0).any(axis=1)
        empty = finite & ~negative & (extent == 0).any(axis=1)
        valid = finite & ~negative & ~empty
        outside = valid & ((high <= 0) | (low >= sizes)).any(axis=1)
        over = (low < -BORDER_TOLERANCE) | (high > sizes + BORDER_TOLERANCE)
        clipped = valid & ~outside & over.any(axis=1)
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
    polygons: bool,
    training: bool,
    own: bool,
    findings: Findings,
) -> None:
    """Check each ``segmentation``, in which `read_json` has left `Polygons`."""
    short: list[dict[str, Any]] = []
    without: list[dict[str, Any]] = []
    wrong: list[tuple[dict[str, Any], str]] = []
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if type(mask) is Polygons:
            if fault := _polygons_fault(mask, images.get(annotation["image_id"])):
                wrong.append((annotation, fault))
            elif any(length < 6 or length % 2 for length in mask.lengths):
                short.append(annotation)
                if all(length < 6 or length % 2 for length in mask.lengths):
                    without.append(annotation)
        elif mask:
            fault = run_length_fault(mask, images.get(annotation["image_id"]))
            if not fault and polygons and annotation.get("iscrowd", 0) == 0:
                fault = "is RLE, which needs INPUT.MASK_FORMAT: bitmask"
            if fault:
                wrong.append((annotation, fault))
        elif required:
            findings.error(
                f"{label(annotation, images)}: has no 'segmentation', but MODEL.MASK_ON is True"
            )
    if required or not own:
        for annotation, fault in wrong:
            findings.error(f"{label(annotation, images)}: 'segmentation' {fault}")
    else:
        fault = "'segmentation' that is wrong (nobody reads it: MODEL.MASK_ON is False)"
        findings.warn(fault, len(wrong), lambda i: f"{label(wrong[i][0], images)} {wrong[i][1]}")
    fault = "polygon of under three points or an odd number of values (Detectron2 drops it)"
    findings.warn(fault, len(short), lambda i: label(short[i], images))
    if training and (required or not own):
        findings.leave_out("no polygon has three points", without)
    elif required and without:
        if len(without) == len(annotations):
            findings.error(
                f"none of the {len(without)} annotations has a polygon of three points or more, so"
                " that there is no AP of masks"
            )
        fault = "annotation without a polygon of three points (the AP of masks ignores the object)"
        findings.warn(fault, len(without), lambda i: label(without[i], images))


def _polygons_fault(mask: Polygons, image: dict[str, Any] | None) -> str:
    """What is wrong with polygons whatever their number of points is; "" if nothing is."""
    if NO_POLYGON in mask.lengths:
        return "must be a list of polygons [[x, y, x, y, …], …] of finite numbers"
    if image is None or (far := far_coordinate(mask.low, mask.high, image)) is None:
        return ""
    size = f"{image['width']} x {image['height']}"
    return (
        f"has a coordinate of {far:g}, but the image is {size} pixels: so far outside, pycocotools"
        " takes all memory or ends the process"
    )


def _check_keypoints(
    annotations: list[dict[str, Any]], images: dict[int, dict[str, Any]], findings: Findings
) -> None:
    labelled = [annotation for annotation in annotations if annotation.get("keypoints")]
    lists = [annotation["keypoints"] for annotation in labelled]
    if _types(lists) <= {list} and _types(chain.from_iterable(lists)) <= {float, int}:
        largest = max(chain.from_iterable(lists), default=0)
        smallest = min(chain.from_iterable(lists), default=0)
        if -_LARGEST < smallest and largest < _LARGEST and not any(len(x) % 3 for x in lists):
            return
    for annotation, points in zip(labelled, lists):
        if not isinstance(points, list) or len(points) % 3 or not all(map(_is_number, points)):
            findings.error(
                f"{label(annotation, images)}: 'keypoints' must be numbers, three for each point"
            )


def _check_evaluation(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    keys: tuple[str, ...],
    findings: Findings,
) -> None:
    """Find what would end an evaluation, hours of training later, in a ``KeyError``.

    COCO's evaluators fill in what is missing, LVIS's does not.
    """
    fills = "iscrowd" in keys
    for key in keys:
        rule, filled = _EVALUATED[key]
        if fills:
            lacking = [annotation for annotation in annotations if annotation.get(key) is None]
            text = f"annotation without {key!r}: the evaluation takes {filled}"
            labels = [label(annotation, images) for annotation in lacking[:EXAMPLES_SHOWN]]
            findings.warn(text, len(lacking), labels.__getitem__)
        for annotation in annotations:
            value = annotation.get(key)
            good = type(value) in (int, float) if key == "area" else value in (0, 1)
            if not good and not (fills and value is None):
                given = repr(value) if key in annotation else "missing"
                findings.error(
                    f"{label(annotation, images)}: {key!r} is {given}, but must be {rule}: "
                    "the evaluation of a dataset in DATASETS.TEST reads it"
                )
