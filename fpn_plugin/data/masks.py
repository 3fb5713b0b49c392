"""Masks of COCO JSON files: what pycocotools, whose C code trusts its input, can be given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

__all__ = ["far_coordinate", "run_length_fault", "usable_mask"]

_LONGEST_RUN = 2**40  # more than an image has pixels, and far from where integers of 64 bits end
# pycocotools takes 200 bytes for a pixel of an outline, also outside of the image, and ends the
# process at 1e8. Augmentation makes a small image some 20 times larger.
_NEAR = 10_000
_FARTHEST = 100  # in sides of the image


def far_coordinate(low: float, high: float, image: dict[str, Any]) -> float | None:
    """A coordinate so far outside of an image that pycocotools must not see it, or None.

    Args:
        low: the least coordinate of the polygons of a mask.
        high: the largest.
        image: its record, with a ``width`` and a ``height``.
    """
    if -_NEAR <= low and high <= _NEAR:
        return None
    limit = max(_NEAR, _FARTHEST * max(image["width"], image["height"]))
    farthest = max(low, high, key=abs)
    return None if abs(farthest) <= limit else farthest


def usable_mask(mask: Any, image: dict[str, Any]) -> Any:
    """A ``segmentation`` as Detectron2 and pycocotools can read it, or None if there is none.

    As in Detectron2's loader, polygons of under three points or of an odd number of values are
    left out, and run lengths are compressed. What would crash pycocotools is left out, too.
    """
    if isinstance(mask, list):
        good = [polygon for polygon in mask if _is_usable(polygon, image)]
        return (mask if len(good) == len(mask) else good) if good else None
    if not isinstance(mask, dict):
        return None
    counts = mask.get("counts")
    if isinstance(counts, (str, bytes)):  # decoded by the checks alone, which takes a while
        return mask if mask.get("size") == [image["height"], image["width"]] else None
    if run_length_fault(mask, image):
        return None
    return mask_util.frPyObjects(mask, *mask["size"])


def _is_usable(polygon: Any, image: dict[str, Any]) -> bool:
    if type(polygon) is not list or len(polygon) % 2 or len(polygon) < 6:
        return False
    try:
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return False
    return finite and far_coordinate(min(polygon), max(polygon), image) is None


def run_length_fault(mask: Any, image: dict[str, Any] | None) -> str:
    """What is wrong with a mask that is no list of polygons; "" if nothing is."""
    if not (isinstance(mask, dict) and {"counts", "size"} <= set(mask)):
        return "must be a list of polygons, or RLE with 'counts' and 'size'"
    size = mask["size"]
    if image is None:
        return ""  # the unknown image is an error already
    if size != [image["height"], image["width"]] or any(type(side) is not int for side in size):
        sides = f"{image['height']} rows and {image['width']} columns"
        return f"is RLE of size {size!r}, but the image has {sides}"
    runs = _runs(mask["counts"])
    if runs is None:
        return "is RLE whose 'counts' are neither numbers of pixels nor pycocotools' text"
    if sum(runs) != size[0] * size[1]:
        return f"is RLE of {sum(runs)} pixels, but the image has {size[0] * size[1]}"
    return ""


def _runs(counts: Any) -> list[int] | None:
    """The lengths of the runs, or None if they cannot be read."""
    if isinstance(counts, str):
        decoded = _decode_runs(counts)
        counts = decoded.tolist() if decoded is not None else None
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        return None
    return counts if all(0 <= run < _LONGEST_RUN for run in counts) else None


def _decode_runs(text: str) -> np.ndarray | None:
    """Run lengths from pycocotools' text, or None if it is malformed.

    Not by pycocotools itself, whose C code trusts the text.
    """
    if not text.isascii() or not text:
        return None
    # A character holds six bits, counted from "0": five of a number, the lowest come first, and
    # whether more of that number follow.
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:  # 40 bits
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), starts)
    # The highest bit of a number is its sign, as in two's complement.
    numbers -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth on, a number is the difference to the run two before.
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs
