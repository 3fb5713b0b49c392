"""A dataset's JSON file: reading it, with or without its polygons, which are most of it, its ids,
and its faults."""

from __future__ import annotations

import gc
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = [
    "EXAMPLES_SHOWN",
    "NO_POLYGON",
    "DatasetError",
    "Findings",
    "Polygons",
    "is_plain_utf8",
    "load_json",
    "read_json",
    "unify_ids",
]

NO_POLYGON = -1  # stands for a polygon that holds anything but finite numbers
_IDS = {
    "images": ("id", "width", "height"),
    "categories": ("id",),
    "annotations": ("id", "image_id", "category_id"),
}
_ERRORS_SHOWN = 10
EXAMPLES_SHOWN = 3


class DatasetError(ValueError):
    """A dataset has faults that would stop training, or spoil training or evaluation."""


class Polygons(NamedTuple):
    """What `read_json` keeps of the polygons of a mask.

    Attributes:
        lengths: how many values each has, or `NO_POLYGON`.
        low: the least coordinate of all, in x or y; infinite without any.
        high: the largest.
    """

    lengths: tuple[int, ...]
    low: float
    high: float


@dataclass
class Findings:
    """The faults of one dataset: errors stop a run, warnings do not. Only texts to show are kept.

    Attributes:
        source: the JSON file, which every message names.
        num_errors: how many errors were found.
        errors: the first of them.
        counts: how often each warning was found.
        examples: the first of each warning.
        left_out: why an annotation does not count in training, by the `id()` of its record.
    """

    source: str
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)

    def error(self, message: str) -> None:
        """Note an error."""
        self.num_errors += 1
        if len(self.errors) < _ERRORS_SHOWN:
            self.errors.append(message)

    def warn(self, fault: str, count: int, describe: Callable[[int], str]) -> None:
        """Note that ``count`` records have a fault; ``describe`` names the i-th of them."""
        if count:
            self.counts[fault] = self.counts.get(fault, 0) + count
            shown = self.examples.setdefault(fault, [])
            shown += [describe(i) for i in range(min(count, EXAMPLES_SHOWN - len(shown)))]

    def leave_out(self, reason: str, annotations: Iterable[Any]) -> None:
        """Note that training leaves out these annotations; the first reason of each counts."""
        for annotation in annotations:
            self.left_out.setdefault(id(annotation), reason)

    def left_out_counts(self) -> dict[str, int]:
        """How many annotations training leaves out for each reason."""
        return dict(Counter(self.left_out.values()))

    def raise_errors(self) -> None:
        """Raise all errors as one.

        Raises:
            DatasetError: there is at least one.
        """
        if not self.num_errors:
            return
        noun = "error" if self.num_errors == 1 else "errors"
        more = self.num_errors - len(self.errors)
        lines = [f"{self.source}: {self.num_errors} {noun}", *(f"  - {e}" for e in self.errors)]
        raise DatasetError("\n".join(lines + ([f"  … and {more} more"] if more else [])))

    def warning_lines(self) -> list[str]:
        """Return one message per warning, with its count and examples."""
        return [
            f"{self.source}: {count} × {fault}; for example {'; '.join(self.examples[fault])}"
            for fault, count in self.counts.items()
        ]


# The content of one file at most, by its path, size and time of modification.
_kept: dict[tuple[str, int, int], dict[str, Any]] = {}


def read_json(path: str, keep: bool = False) -> dict[str, Any]:
    """Read a COCO JSON file, with the polygons of every mask replaced by `Polygons`.

    Args:
        keep: whether the content stays in memory for the next call. If that is for the same file,
            it gets the content without reading the file again; in any case it is released then.

    Raises:
        DatasetError: the file cannot be read, is not JSON, or holds anything but an object.
    """
    with _reading(path):
        stat = os.stat(path)
        key = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
        content = _kept.pop(key, None)
        _kept.clear()
        if content is None:
            content = _parse(path, _without_polygons)
    if keep:
        _kept[key] = content
    return content


def load_json(path: str) -> dict[str, Any]:
    """Read a COCO JSON file with its polygons.

    Raises:
        DatasetError: as :func:`read_json`.
    """
    with _reading(path):
        return _parse(path, None)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: is not text in {error.encoding}: {error.reason} at byte {error.start}; save"
            " it as UTF-8 (an older Windows tool writes Latin-1 or cp1252)"
        ) from None
    except RecursionError:
        raise DatasetError(f"{path}: its values are nested too deeply") from None
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{path}: is not JSON: {error}") from None


def _parse(path: str, hook: Callable[[dict[str, Any]], Any] | None) -> dict[str, Any]:
    with open(path, encoding=_encoding(path)) as stream, _no_collector():
        content = json.load(stream, object_hook=hook)
    if not isinstance(content, dict):
        name = type(content).__name__
        raise DatasetError(f"{path}: holds a JSON {name}, but COCO's format is an object")
    return content


def _encoding(path: str) -> str:
    """UTF-8, 16 or 32, with or without a byte order mark, by the first bytes."""
    with open(path, "rb") as file:
        return json.detect_encoding(file.read(4))


def is_plain_utf8(path: str) -> bool:
    """Whether pycocotools' plain `open` can read a file: one in UTF-8 without byte order mark."""
    return _encoding(path) == "utf-8"


def unify_ids(content: dict[str, Any]) -> None:
    """Bring ids and sizes whose meaning is clear into one form, in place.

    A float that is a whole number becomes an integer, and so does a text for a size in pixels. An
    annotation refers to its image and category by that one's own id, be it a number or text, if it
    only differs in that; an "iscrowd" of null is 0.
    """
    tables = {
        table: [record for record in content.get(table) or () if isinstance(record, dict)]
        for table in _IDS
        if isinstance(content.get(table), list)
    }
    for image in tables.get("images", ()):
        for key in ("width", "height"):
            if type(image.get(key)) is str:
                with suppress(ValueError):  # which the checks report
                    image[key] = float(image[key])
    for annotation in tables.get("annotations", ()):
        if annotation.get("iscrowd", 0) is None:
            annotation["iscrowd"] = 0
    for table, records in tables.items():
        for key in _IDS[table]:
            if float in set(map(type, (record.get(key) for record in records))):
                for record in records:
                    value = record.get(key)
                    if type(value) is float and value.is_integer():
                        record[key] = int(value)
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        _unify_references(tables.get("annotations", []), key, tables.get(table, []))


def _unify_references(
    annotations: list[dict[str, Any]], key: str, targets: list[dict[str, Any]]
) -> None:
    try:
        ids = {target.get("id") for target in targets}
        unknown = {annotation.get(key) for annotation in annotations} - ids
    except TypeError:  # a list as an id, which the checks refuse
        return
    by_text = {str(value): value for value in ids if type(value) in (int, str)}
    if not unknown or len(by_text) < len(ids):
        return
    same = {
        value: by_text[str(value)]
        for value in unknown
        if type(value) in (int, str) and str(value) in by_text
    }
    for annotation in annotations if same else ():
        annotation[key] = same.get(annotation.get(key), annotation.get(key))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time: JSON makes no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_polygons(record: dict[str, Any]) -> dict[str, Any]:
    segmentation = record.get("segmentation")
    if type(segmentation) is list and segmentation:
        if len(segmentation) == 1:
            length, low, high = _measure(segmentation[0])
            record["segmentation"] = Polygons((length,), low, high)
        else:
            lengths, lows, highs = zip(*map(_measure, segmentation))
            record["segmentation"] = Polygons(lengths, min(lows), max(highs))
    return record


def _measure(polygon: Any) -> tuple[int, float, float]:
    """Length, least and largest coordinate."""
    if type(polygon) is not list:
        return NO_POLYGON, math.inf, -math.inf
    try:
        if not math.isfinite(sum(polygon)):
            return NO_POLYGON, math.inf, -math.inf
    except (TypeError, OverflowError):  # text, or an integer that is too large for a float
        return NO_POLYGON, math.inf, -math.inf
    return (len(polygon), min(polygon), max(polygon)) if polygon else (0, math.inf, -math.inf)
