"""Checks of what a model with a keypoint head reads of a COCO JSON file."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from .annotation_checks import BORDER_TOLERANCE, label
from .coco_json import Findings

__all__ = ["check_keypoint_annotations"]


def check_keypoint_annotations(
    content: dict[str, Any],
    images: dict[int, dict[str, Any]],
    count: int,
    findings: Findings,
) -> None:
    """Check what a model with a keypoint head reads of ``annotations``.

    Args:
        content: the JSON file's, after :func:`check_annotations`.
        images: the valid images by id.
        count: how many keypoints an object has; 0 if the file has no keypoints.
    """
    annotations = [
        annotation
        for annotation in content.get("annotations") or []
        if isinstance(annotation, dict) and annotation.get("image_id") in images
    ]
    labelled = [a for a in annotations if isinstance(a.get("keypoints"), list) and a["keypoints"]]
    if annotations and not labelled:
        findings.error(
            f"none of {len(annotations)} annotations has 'keypoints', but MODEL.KEYPOINT_ON is True"
        )
    wrong = [a for a in labelled if len(a["keypoints"]) != 3 * count]
    for annotation in wrong:
        points = annotation["keypoints"]
        findings.error(
            f"{label(annotation, images)}: 'keypoints' has {len(points)} numbers, but must have"
            f" {3 * count}, three for each of {count} keypoints"
        )
    bare = [a for a in annotations if not a.get("keypoints") and not a.get("iscrowd", 0)]
    fault = "annotation without keypoints (its box counts, its keypoints are not looked for)"
    findings.warn(fault, len(bare), lambda i: label(bare[i], images))
    if not findings.num_errors and labelled:
        _check_points(labelled, images, count, findings)


def _check_points(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    count: int,
    findings: Findings,
) -> None:
    """Check the values of keypoints, which are numbers and three for each point."""
    numbers = chain.from_iterable(annotation["keypoints"] for annotation in annotations)
    points = np.fromiter(numbers, float, 3 * count * len(annotations)).reshape(-1, count, 3)
    if not np.isfinite(points).all():
        for i in np.flatnonzero(~np.isfinite(points).all(axis=(1, 2))):
            findings.error(f"{label(annotations[i], images)}: 'keypoints' must be finite")
        return
    places, visible = points[..., :2], points[..., 2]
    seen = visible > 0
    if not seen.any():
        findings.error(
            "no keypoint is labelled: the third number of each is its visibility, 0 to 2"
        )
        return
    keys = ("width", "height")
    sizes = np.array([[images[a["image_id"]][key] for key in keys] for a in annotations], float)
    if places[seen].max() <= 1 and places[seen].min() >= 0 and seen.sum() > 1:
        findings.error(
            "all keypoints lie between 0 and 1: COCO's format has pixels, not parts of the image"
        )
    over = (places < -BORDER_TOLERANCE) | (places > sizes[:, None] + BORDER_TOLERANCE)
    stated = [annotation.get("num_keypoints") for annotation in annotations]
    miscounted = [given not in (None, n) for given, n in zip(stated, seen.sum(1).tolist())]
    faults = {
        "labelled keypoint outside the image (Detectron2 does not train on it)": (
            seen & over.any(axis=2)
        ).any(axis=1),
        "visibility that is not 0, 1 or 2 (above 0 counts as labelled)": (
            ((visible != 0) & (visible != 1) & (visible != 2)).any(axis=1)
        ),
        "'num_keypoints' that is not the number of labelled keypoints (the evaluation leaves out"
        " objects with 0)": np.array(miscounted),
    }
    for fault, wrong in faults.items():
        hits = np.flatnonzero(wrong)

        def describe(i: int, hits: np.ndarray = hits) -> str:
            return label(annotations[hits[i]], images)

        findings.warn(fault, len(hits), describe)
