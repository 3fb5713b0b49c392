"""Checks of a dataset's images: their names stay below the image folder unless the user allows
more, the files exist, have the size the JSON says, and can be decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from .coco_json import DatasetError, Findings

__all__ = [
    "OUTSIDE_KEY",
    "READ_ERRORS",
    "check_image_files",
    "check_loaded",
    "image_file_name",
    "name_fault",
    "upright_size",
]

OUTSIDE_KEY = "DATASETS.OUTSIDE_FILES"
_REMEDY = f"must stay below the image folder (unless {OUTSIDE_KEY} is True)"

# what Pillow raises for a file that it cannot read or decode; FileNotFoundError is an OSError
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
# Errors are counted exactly, but trying every file of a folder that was moved helps nobody.
_GIVE_UP = 1000


def image_file_name(image: dict[str, Any]) -> str | None:
    """Return an image's path below the image folder."""
    name = image.get("file_name")
    return name if isinstance(name, str) and name else None


def name_fault(name: str, outside: bool = False) -> str:
    """What is wrong with a name that is relative to a folder; "" if nothing is.

    A symbolic link in the folder may lead anywhere: the folder's owner made it.

    Args:
        outside: whether the name may lead out of the folder.
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
    """Refuse dataset dicts, as Detectron2 has loaded them, of files outside of their folder.

    Args:
        source: the JSON file, for messages.

    Raises:
        DatasetError: for the first such file.
    """
    below = os.path.join(os.path.abspath(folder), "")
    for record in records:
        if not os.path.abspath(record["file_name"]).startswith(below):
            raise DatasetError(
                f"{source}: image id {record['image_id']}: {record['file_name']!r} {_REMEDY}"
            )


def check_image_files(
    images: Iterable[dict[str, Any]], folder: str, decode: bool, findings: Findings
) -> None:
    """Check the files behind COCO's image records.

    Args:
        images: records that have a ``file_name``, ``width`` and ``height``.
        folder: what ``file_name`` is relative to.
        decode: whether to decode every file to its end, which alone finds truncated ones.
        findings: where faults are noted.
    """
    if not os.path.isdir(folder):
        findings.error(f"the image folder {folder!r} does not exist")
        return
    named = [(image, name) for image in images if (name := image_file_name(image))]
    # Pillow decodes outside the interpreter's lock, so threads do help.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(named), _GIVE_UP):
            chunk: Sequence[tuple[dict[str, Any], str]] = named[start : start + _GIVE_UP]
            faults = pool.map(lambda pair: _fault(pair[0], pair[1], folder, decode), chunk)
            for (image, name), fault in zip(chunk, faults):
                if fault:
                    findings.error(f"image {name!r} (id {image['id']}): {fault}")
            if findings.num_errors >= _GIVE_UP:
                findings.error(f"too many errors: checked {start + len(chunk)} images only")
                return


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the rotation of the EXIF tag, as Detectron2 reads an image."""
    width, height = image.size
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    return (height, width) if turned else (width, height)


def _fault(image: dict[str, Any], name: str, folder: str, decode: bool) -> str | None:
    path = os.path.join(folder, name)
    try:
        with Image.open(path) as file:
            size = upright_size(file)
            turned = size != file.size
            if decode:
                file.load()
    except FileNotFoundError:
        return f"the file {path} does not exist"
    except UnidentifiedImageError:
        return f"the file {path} is not an image"
    except READ_ERRORS as error:
        return f"the file {path} cannot be read to its end: {error}"
    if size != (image["width"], image["height"]):
        note = " (turned as its EXIF tag says)" if turned else ""
        claimed = f"{image['width']} x {image['height']}"
        return f"the file is {size[0]} x {size[1]} pixels{note}, but the JSON says {claimed}"
    return None
