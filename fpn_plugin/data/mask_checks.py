"""Checks of COCO's masks: polygons, and run lengths as numbers or as pycocotools' text."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from .coco_json import NO_POLYGON
from .findings import Findings

__all__ = ["check_masks"]

_RUN = 2**40  # more than an image has pixels, and far from where integers of 64 bits end


def check_masks(
    annotations: list[dict[str, Any]],
    images: dict[int, dict[str, Any]],
    needs: tuple[bool, bool],
    findings: Findings,
    label: Callable[[dict[str, Any], dict[int, dict[str, Any]]], str],
) -> None:
    """Check each ``segmentation``, as `coco_json` reads it.

    Args:
        needs: whether every annotation must have one, and whether only polygons will do.
        label: the name of an annotation in messages.
    """
    short: list[dict[str, Any]] = []
    required, polygons = needs
    for annotation in annotations:
        shape = annotation.get("segmentation")
        if type(shape) is list and shape:
            if NO_POLYGON in shape:
                findings.error(
                    f"{label(annotation, images)}: 'segmentation' has a polygon that is not a list"
                    " of finite numbers [x, y, x, y, …]"
                )
            elif any(length < 6 or length % 2 for length in shape):
                short.append(annotation)
        elif shape:
            fault = _run_length_fault(shape, images.get(annotation["image_id"]))
            if not fault and polygons and annotation.get("iscrowd", 0) == 0:
                fault = "is RLE, which needs INPUT.MASK_FORMAT: bitmask"
            if fault:
                findings.error(f"{label(annotation, images)}: 'segmentation' {fault}")
        elif required:
            findings.error(
                f"{label(annotation, images)}: has no 'segmentation', but MODEL.MASK_ON is True"
            )
    kind = "polygon of under three points or an odd number of values (Detectron2 drops it)"
    findings.warn(kind, len(short), lambda i: label(short[i], images))


def _run_length_fault(shape: Any, image: dict[str, Any] | None) -> str:
    """What is wrong with a mask that is no list of polygons; "" if nothing is."""
    if not (isinstance(shape, dict) and {"counts", "size"} <= set(shape)):
        return "must be a list of polygons, or RLE with 'counts' and 'size'"
    size = shape["size"]
    if image is None:
        return ""  # an error already
    if size != [image["height"], image["width"]] or any(type(side) is not int for side in size):
        sides = f"{image['height']} rows and {image['width']} columns"
        return f"is RLE of size {size!r}, but the image has {sides}"
    runs = _runs(shape["counts"])
    if runs is None:
        return "is RLE whose 'counts' are neither numbers of pixels nor pycocotools' text"
    if sum(runs) != size[0] * size[1]:
        return f"is RLE of {sum(runs)} pixels, but the image has {size[0] * size[1]}"
    return ""


def _runs(counts: Any) -> list[int] | None:
    """The lengths of the runs, or None if they cannot be read."""
    if isinstance(counts, str):
        decoded = _decoded(counts)
        counts = decoded.tolist() if decoded is not None else None
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        return None
    return counts if all(0 <= run < _RUN for run in counts) else None


def _decoded(text: str) -> np.ndarray | None:
    """Run lengths from pycocotools' text: groups of five bits, the lowest first, each in a
    character from "0" on whose sixth bit says that more follow; from the fourth on, the difference
    to the run two before."""
    if not text.isascii() or not text:
        return None
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:  # 40 bits
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)  # the sign
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs
