"""Signs that a dataset's coordinates are no pixels, or its boxes no x, y, width and height.

A box alone may be anything; what all or most of them share tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .coco_json import Findings, Polygons

__all__ = ["check_units"]

_COCO = "but COCO's are [x, y, width, height] in pixels"
_FEW = 5  # boxes that are too few for a rule of most of them
_MOST = 0.95
_TOLERANCE = 1.0  # pixels by which rounding may move an edge
_UNIT = 1.01  # the largest of coordinates from 0 to 1, with rounding
_SMALL_IMAGE = 8  # sides up to which a box of one pixel may be the whole truth


def check_units(
    boxes: np.ndarray,
    sizes: np.ndarray,
    annotations: Sequence[dict[str, Any]],
    masks: bool,
    findings: Findings,
    label: Callable[[int], str],
) -> None:
    """Note what the boxes and polygons of a dataset look like if that is not COCO's format.

    Args:
        boxes: ``(N, 4)``, as x, y, width, height.
        sizes: width and height of each box's image, ``(N, 2)``.
        annotations: those of the boxes.
        masks: whether the polygons are read.
        label: names the i-th annotation.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        sound = np.flatnonzero(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1))
        sound = sound[(sizes[sound] > _SMALL_IMAGE).all(axis=1)]
        if len(sound):
            _check_boxes(boxes[sound], sizes[sound], annotations, sound, findings, label)
        _check_polygons(boxes, sizes, annotations, masks, findings, label)


def _check_boxes(
    boxes: np.ndarray,
    sizes: np.ndarray,
    annotations: Sequence[dict[str, Any]],
    sound: np.ndarray,
    findings: Findings,
    label: Callable[[int], str],
) -> None:
    def example(i: int) -> str:
        return f"{label(sound[i])}: bbox {annotations[sound[i]]['bbox']}"

    unit = ((boxes >= -0.01) & (boxes <= _UNIT)).all(axis=1)
    if unit.all() and (boxes % 1 != 0).any():
        findings.error(
            f"all boxes lie between 0 and 1, such as {example(0)}: they look normalised to the"
            f" image's size, {_COCO}"
        )
        return
    tiny = np.flatnonzero((boxes[:, 2:] < 1).all(axis=1))
    findings.warn(
        "box that is smaller than a pixel (are some normalised to 0..1?)",
        len(tiny),
        lambda i: example(tiny[i]),
    )
    low, extent = boxes[:, :2], boxes[:, 2:]
    over = (low + extent > sizes + _TOLERANCE).any(axis=1)
    if len(boxes) < _FEW:
        return
    inside = (boxes >= -_TOLERANCE).all(axis=1) & (extent <= sizes + _TOLERANCE).all(axis=1)
    corners = inside & (extent > low).all(axis=1)
    centres = (low >= extent / 2 - _TOLERANCE).all(axis=1)
    centres &= (low + extent / 2 <= sizes + _TOLERANCE).all(axis=1)
    if over.mean() >= 0.25 and corners.mean() >= _MOST:
        _note_corners(boxes, [annotations[i].get("area") for i in sound], over, findings, example)
    elif over.mean() >= 0.1 and centres.mean() >= _MOST:
        hits = np.flatnonzero(over)
        fault = f"box over the border: they look like [centre x, centre y, width, height], {_COCO}"
        findings.warn(fault, len(hits), lambda i: example(hits[i]))
    elif (far := (low + extent > 1.25 * sizes).any(axis=1)).mean() >= 0.5:
        hits = np.flatnonzero(far)
        fault = (
            "box far over the border, as most are: they look like another unit than pixels, or the"
            " images have been made smaller since"
        )
        findings.warn(fault, len(hits), lambda i: example(hits[i]))
    percent = (boxes[:, :2] + boxes[:, 2:] <= 101).all() and (sizes >= 300).all()
    if percent and len(boxes) >= 4 * _FEW and (boxes[:, :2] + boxes[:, 2:]).max() > 80:
        fault = "box in the image's upper left 100 x 100 pixels, as all are: are they in percent?"
        findings.warn(fault, len(boxes), example)


def _note_corners(
    boxes: np.ndarray,
    areas: Sequence[Any],
    over: np.ndarray,
    findings: Findings,
    example: Callable[[int], str],
) -> None:
    """Note boxes that look like corners: an error if the areas of the annotations say so, too."""
    sign = f"look like corners [x1, y1, x2, y2], {_COCO}"
    hits = np.flatnonzero(over)
    if all(type(area) in (int, float) and area > 0 for area in areas):
        between = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)  # if they are corners
        area = np.array(areas, float)
        # A mask covers a part of its box, so that the second condition alone says little.
        if np.median(area / np.prod(boxes[:, 2:], axis=1)) < 0.5 and (
            (area <= 1.1 * between).mean() >= _MOST
        ):
            findings.error(f"the boxes, such as {example(hits[0])}, {sign}; so do their areas")
            return
    findings.warn(f"box over the border: they {sign}", len(hits), lambda i: example(hits[i]))


def _check_polygons(
    boxes: np.ndarray,
    sizes: np.ndarray,
    annotations: Sequence[dict[str, Any]],
    masks: bool,
    findings: Findings,
    label: Callable[[int], str],
) -> None:
    indices = [i for i, a in enumerate(annotations) if type(a.get("segmentation")) is Polygons]
    if not indices:
        return
    polygons = [annotations[i]["segmentation"] for i in indices]
    low = np.array([polygon.low for polygon in polygons], float)
    high = np.array([polygon.high for polygon in polygons], float)
    known = np.isfinite(low) & np.isfinite(high) & (sizes[indices] > _SMALL_IMAGE).all(axis=1)
    chosen = np.array(indices)[known]
    low, high = low[known], high[known]
    if not len(chosen):
        return
    if (low >= -0.01).all() and (high <= _UNIT).all() and ((low % 1 != 0) | (high % 1 != 0)).any():
        text = (
            f"all polygons lie between 0 and 1, such as that of {label(chosen[0])}: they look"
            " normalised to the image's size, but COCO's are in pixels"
        )
        if masks:
            findings.error(text)
        else:
            findings.warn(text, 1, lambda i: "MODEL.MASK_ON is False, so that they are not read")
        return
    end = boxes[chosen][:, :2] + boxes[chosen][:, 2:]
    largest = end.max(axis=1)
    other = np.flatnonzero(np.abs(high - largest) > 5 + np.maximum(high, largest) / 4)
    if len(chosen) >= _FEW and len(other) >= 0.5 * len(chosen):
        findings.warn(
            "box that does not end where its polygons do: one of them is in other units or order",
            len(other),
            lambda i: f"{label(chosen[other[i]])}: bbox {annotations[chosen[other[i]]]['bbox']},"
            f" polygons up to {high[other[i]]:g}",
        )
