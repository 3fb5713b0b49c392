"""Reading a COCO JSON file without keeping its polygons, which are most of it."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .findings import DatasetError

__all__ = ["NO_POLYGON", "read_json"]

NO_POLYGON = -1  # in the place of a polygon's length, if it holds anything but finite numbers


def read_json(path: str) -> dict[str, Any]:
    """Read a COCO JSON file; in the place of polygons are their lengths, or `NO_POLYGON`.

    Raises:
        DatasetError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        with open(path, encoding="utf-8") as stream, _no_collector():
            content = json.load(stream, object_hook=_without_polygons)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DatasetError(f"{path}: is not JSON: {error}") from None
    except RecursionError:
        raise DatasetError(f"{path}: its values are nested too deeply") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DatasetError(f"{path}: holds a JSON {kind}, but COCO's format is an object")
    return content


@contextmanager
def _no_collector() -> Iterator[None]:
    """The garbage collector would look at millions of new objects again and again: a third of the
    time, and JSON makes no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_polygons(record: dict[str, Any]) -> dict[str, Any]:
    shape = record.get("segmentation")
    if type(shape) is list:
        record["segmentation"] = [_length(part) for part in shape]
    return record


def _length(part: Any) -> int:
    if type(part) is not list:
        return NO_POLYGON
    try:
        return len(part) if math.isfinite(sum(part)) else NO_POLYGON
    except (TypeError, OverflowError):  # a number must be one that a float can be
        return NO_POLYGON
