"""A dataset's JSON file: reading it without its polygons, which are most of it, and its faults."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NO_POLYGON", "DatasetError", "Findings", "read_json"]

NO_POLYGON = -1  # stands for a polygon that holds anything but finite numbers
_ERRORS_SHOWN = 10
_EXAMPLES_SHOWN = 3


class DatasetError(ValueError):
    """A dataset has faults that would stop training, or spoil training or evaluation."""


@dataclass
class Findings:
    """The faults of one dataset: errors stop a run, warnings do not. Only texts to show are kept.

    Attributes:
        source: the JSON file, which every message names.
        num_errors: how many errors were found.
        errors: the first of them.
        counts: how often each warning was found.
        examples: the first of each warning.
    """

    source: str
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

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
            shown += [describe(i) for i in range(min(count, _EXAMPLES_SHOWN - len(shown)))]

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
    """Read a COCO JSON file, with every polygon replaced by its length, or by `NO_POLYGON`.

    Args:
        keep: whether the content stays in memory for the next call. If that is for the same file,
            it gets the content without reading the file again; in any case it is released then.

    Raises:
        DatasetError: the file cannot be read, is not JSON, or holds anything but an object.
    """
    try:
        stat = os.stat(path)
        key = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
        content = _kept.pop(key, None)
        _kept.clear()
        if content is None:
            content = _parse(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DatasetError(f"{path}: is not JSON: {error}") from None
    except RecursionError:
        raise DatasetError(f"{path}: its values are nested too deeply") from None
    if not isinstance(content, dict):
        name = type(content).__name__
        raise DatasetError(f"{path}: holds a JSON {name}, but COCO's format is an object")
    if keep:
        _kept[key] = content
    return content


def _parse(path: str) -> Any:
    with open(path, encoding="utf-8") as stream, _no_collector():
        return json.load(stream, object_hook=_without_polygons)


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
    if type(segmentation) is list:
        record["segmentation"] = [_length(polygon) for polygon in segmentation]
    return record


def _length(polygon: Any) -> int:
    if type(polygon) is not list:
        return NO_POLYGON
    try:
        return len(polygon) if math.isfinite(sum(polygon)) else NO_POLYGON
    except (TypeError, OverflowError):  # text, or an integer that is too large for a float
        return NO_POLYGON
