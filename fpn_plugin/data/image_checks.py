"""Checks of a dataset's images: their names stay below the image folder unless the user allows
more, the files exist, have the size the JSON says, and can be decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from .coco_json import DatasetError, Findings
from .deep_images import DEEP_KEY, RULES, as_8_bit, is_deep

__all__ = [
    "OUTSIDE_KEY",
    "READ_ERRORS",
    "check_image_files",
    "check_loaded",
    "image_file_name",
    "name_fault",
    "read_fault",
    "upright_size",
]

OUTSIDE_KEY = "DATASETS.OUTSIDE_FILES"
_REMEDY = f"must stay below the image folder (unless {OUTSIDE_KEY} is True)"

# what Pillow raises for a file that it cannot read or decode; FileNotFoundError is an OSError
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 256, 257
_TURNED = (5, 6, 7, 8)
_UNREADABLE_MODES = ("LAB", "La")  # Pillow opens them, but converts them to nothing else
# Errors are counted exactly, but trying every file of a folder that was moved helps nobody.
_GIVE_UP = 1000
_HINTS = 3  # each compares a name with all others

_ONE_VALUE = "image whose pixels all have one value"
_PAGES = "image of several pages, of which only the first is read"
_ALPHA = "image with transparent parts, of which the colours underneath are read"


class _Verdict(NamedTuple):
    """What is wrong with an image's file, and what else to know of it: warnings."""

    fault: str = ""
    notes: tuple[str, ...] = ()
    is_missing: bool = False


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
    images: Iterable[dict[str, Any]],
    folder: str,
    decode: bool,
    findings: Findings,
    deep_images: str = "percentile",
    hint: Callable[[str], str] = lambda name: "",
) -> None:
    """Check the files behind COCO's image records.

    Args:
        images: records that have a ``file_name``, ``width`` and ``height``.
        folder: what ``file_name`` is relative to.
        decode: whether to decode every file to its end, which alone finds truncated ones.
        findings: where faults are noted.
        deep_images: `INPUT.DEEP_IMAGES`.
        hint: from the name of a file that does not exist to a remark on what may be meant.
    """
    if not os.path.isdir(folder):
        findings.error(f"the image folder {folder!r} does not exist")
        return
    named = [(image, name) for image in images if (name := image_file_name(image))]
    # Pillow decodes outside the interpreter's lock, so threads do help.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(named), _GIVE_UP):
            chunk: Sequence[tuple[dict[str, Any], str]] = named[start : start + _GIVE_UP]
            verdicts = pool.map(lambda p: _inspect(p[0], p[1], folder, decode, deep_images), chunk)
            for (image, name), verdict in zip(chunk, verdicts):
                if verdict.fault:
                    is_hinted = verdict.is_missing and findings.num_errors < _HINTS
                    remark = hint(name) if is_hinted else ""
                    findings.error(f"image {name!r} (id {image['id']}): {verdict.fault}{remark}")
                for note in verdict.notes:
                    findings.warn(note, 1, lambda _, name=name: repr(name))  # type: ignore[misc]
            if findings.num_errors >= _GIVE_UP:
                findings.error(f"too many errors: checked {start + len(chunk)} images only")
                return


def upright_size(image: Any) -> tuple[int, int]:
    """Width and height after the rotation of the EXIF tag, as an image is read."""
    # Pillow gives those of a TIFF turned already
    is_tiff = image.format == "TIFF"
    width, height = (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]) if is_tiff else image.size
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    return (height, width) if turned else (width, height)


def read_fault(error: Exception) -> str:
    """What is wrong with an image for which Pillow raised one of `READ_ERRORS`."""
    if not isinstance(error, Image.DecompressionBombError):
        return str(error)
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
    return (
        f"it has more than {most} million pixels, the most that Pillow opens: cut it into tiles or"
        " make it smaller (or raise PIL.Image.MAX_IMAGE_PIXELS in a script of your own, if you"
        " trust the file)"
    )


def _inspect(
    image: dict[str, Any], name: str, folder: str, decode: bool, deep_images: str
) -> _Verdict:
    path = os.path.join(folder, name)
    notes = []
    try:
        with Image.open(path) as file:
            size = upright_size(file)
            turned = size != file.size
            mode, deep = file.mode, is_deep(file)
            if deep:
                rule = f"{RULES[deep_images]} ({DEEP_KEY}: {deep_images})"
                notes.append(f"image of more than 8 bits per channel, scaled to 0...255 {rule}")
            # of an MPO, which is a JPEG with more pictures, everyone means the first
            if file.format != "MPO" and getattr(file, "is_animated", False):
                notes.append(_PAGES)
            if decode:
                file.load()
                notes += [_ALPHA] if _shows_through(file) else []
                notes += [_ONE_VALUE] if not deep and _has_one_value(file) else []
        if decode and deep:
            with open(path, "rb") as stream:
                notes += [_ONE_VALUE] if _has_one_value(as_8_bit(stream, deep_images)) else []
    except FileNotFoundError:
        return _Verdict(f"the file {path} does not exist", is_missing=True)
    except UnidentifiedImageError:
        return _Verdict(f"the file {path} is not an image that Pillow reads")
    except READ_ERRORS as error:
        return _Verdict(f"the file {path} cannot be read to its end: {read_fault(error)}")
    if mode in _UNREADABLE_MODES:
        return _Verdict(f"the file {path} has colours of type {mode}: save it in RGB")
    if size != (image["width"], image["height"]):
        note = " (turned as its EXIF tag says)" if turned else ""
        claimed = f"{image['width']} x {image['height']}"
        return _Verdict(
            f"the file is {size[0]} x {size[1]} pixels{note}, but the JSON says {claimed}"
        )
    return _Verdict(notes=tuple(notes))


def _shows_through(picture: Any) -> bool:
    """Whether a loaded image has an alpha channel that is not opaque everywhere."""
    return "A" in picture.getbands() and picture.getchannel("A").getextrema()[0] < 255


def _has_one_value(picture: Any) -> bool:
    """Whether all pixels are the same; most pictures show that they are not at a few places."""
    width, height = picture.size
    places = [(width * i // 4, height * (3 * i % 5) // 5) for i in range(4)]
    if len({picture.getpixel(place) for place in places}) > 1:
        return False
    bands = picture.getextrema()
    pairs = [bands] if len(picture.getbands()) == 1 else bands
    return all(low == high for low, high in pairs)
