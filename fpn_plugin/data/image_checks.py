"""Checks of a dataset's pictures: they exist, have the size the JSON says, and can be decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image, UnidentifiedImageError

from .annotation_checks import image_file_name
from .findings import Findings

__all__ = ["READ_ERRORS", "check_pictures", "upright_size"]

# what Pillow raises for a file that it cannot read or decode; FileNotFoundError is an OSError
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
# Shown and counted exactly, but reading every file of a folder that is not there helps nobody.
_GIVE_UP = 1000


def check_pictures(
    images: Iterable[dict[str, Any]], folder: str, decode: bool, findings: Findings
) -> None:
    """Check the files behind COCO's image records.

    Args:
        images: records that have a ``file_name``, ``width`` and ``height``.
        folder: what ``file_name`` is relative to.
        decode: whether to decode all of every file, which alone finds truncated ones.
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


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height after the turn that its EXIF tag asks for, as Detectron2 reads a picture."""
    width, height = picture.size
    turned = picture.getexif().get(_ORIENTATION) in _TURNED
    return (height, width) if turned else (width, height)


def _fault(image: dict[str, Any], name: str, folder: str, decode: bool) -> str | None:
    path = os.path.join(folder, name)
    try:
        with Image.open(path) as picture:
            size = upright_size(picture)
            turned = size != picture.size
            if decode:
                picture.load()
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
