"""File names in a dataset's JSON: they stay below the dataset's folder unless the user says
otherwise."""

from __future__ import annotations

import os
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Iterable

from .findings import DatasetError

__all__ = ["KEY", "check_loaded", "name_fault"]

KEY = "DATASETS.OUTSIDE_FILES"
_REMEDY = f"must stay below the image folder (unless {KEY} is True)"


def name_fault(name: str, outside: bool = False) -> str:
    """What is wrong with a name that is relative to a folder; "" if nothing is.

    A link in the folder may lead anywhere: whoever owns the folder made it.

    Args:
        outside: whether it may lead out of the folder.
    """
    try:
        broken = "\0" in name or not os.fsencode(name)
    except UnicodeEncodeError:
        broken = True
    if broken:
        return "cannot be the name of a file"
    paths = (PurePosixPath(name), PureWindowsPath(name))
    leaves = any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
    return _REMEDY if leaves and not outside else ""


def check_loaded(records: Iterable[dict[str, Any]], folder: str, source: str) -> None:
    """Refuse records, as Detectron2 has loaded them, of files outside of their folder.

    Args:
        source: the JSON file, for messages.

    Raises:
        DatasetError: naming the first of them.
    """
    below = os.path.join(os.path.abspath(folder), "")
    for record in records:
        if not os.path.abspath(record["file_name"]).startswith(below):
            raise DatasetError(
                f"{source}: image id {record['image_id']}: {record['file_name']!r} {_REMEDY}"
            )
