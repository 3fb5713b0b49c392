"""Images of more than 8 bits per channel, which Detectron2 alone would clip to white or black.

`INPUT.DEEP_IMAGES` says how their values become the 0 to 255 of all other images. Detectron2 reads
the result by a prefix of the file's name, which a handler of its `PathManager` serves; images of 8
bits are left to Detectron2.
"""

from __future__ import annotations

import io
import logging
import math
import re
import sys
from typing import IO, Any, Mapping

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathHandler, PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, ImageOps

from fpn_plugin.registry import unknown_name

__all__ = ["DEEP_KEY", "RULES", "as_8_bit", "check_rule", "is_deep", "read_image", "readable"]

DEEP_KEY = "INPUT.DEEP_IMAGES"
RULES = {
    "percentile": "from the 0.1st percentile of each image to its 99.9th",
    "full": "over the full range of the file's type (floats: from 0 to 1)",
}
_PERCENTILES = (0.1, 99.9)
_PREFIX = "fpn_plugin-{}-8-bit://"
# Pillow's names for 16-bit colours in a file, of which it reads the upper bytes only
_COLOURS = re.compile(r"(RGB[AaX]?|LA);16([BLN])")
_LOWER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_ORIENTATION, _BITS, _SAMPLE_FORMAT, _NO_DATA = 0x0112, 258, 339, 42113  # tags
_SIGNED = 2  # a sample format


def check_rule(rule: str) -> str:
    """The value of `INPUT.DEEP_IMAGES`.

    Raises:
        KeyError: if it is unknown.
    """
    if rule not in RULES:
        raise unknown_name(DEEP_KEY, rule, RULES)
    return rule


def is_deep(file: Image.Image) -> bool:
    """Whether an image, opened but not loaded, has more than 8 bits per channel."""
    return _is_gray(file) or _colours(file) is not None


def as_8_bit(stream: IO[bytes], rule: str) -> Image.Image:
    """The image of a file with its values scaled to 0...255, upright, without an alpha channel.

    All channels are scaled alike. What is not finite, or stands for "no data" in a GeoTIFF, becomes
    black and does not count in a percentile. An image of 8 bits is only turned.

    Args:
        rule: one of `RULES`.
    """
    stream.seek(0)
    with Image.open(stream) as file:
        if is_deep(file):
            tags = dict(getattr(file, "tag_v2", {}))
            low, high = _type_range(file, tags)
            values = _read_values(file, stream)
            picture = Image.fromarray(_scaled(values, low, high, _no_data(tags), rule))
        else:
            picture = file.convert("RGB")
        # Pillow turns a TIFF when it loads it, and then no orientation is left
        picture.getexif()[_ORIENTATION] = file.getexif().get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(picture)


def readable(path: str, rule: str) -> str:
    """The name by which Detectron2's `read_image` gets an image right.

    It is the path itself, unless the image is deep, or is a TIFF with an orientation (by which both
    Pillow and Detectron2 would turn it).

    Args:
        rule: one of `RULES`.
    """
    with PathManager.open(path, "rb") as stream, Image.open(stream) as file:
        if is_deep(file):
            log_first_n(
                logging.INFO,
                f"Images of more than 8 bits per channel, such as {path}, are scaled to 0...255"
                f" {RULES[rule]} ({DEEP_KEY}: {rule})",
                name=__name__,
            )
        elif file.format != "TIFF" or file.getexif().get(_ORIENTATION, 1) == 1:
            return path
    return _PREFIX.format(rule) + path


def read_image(path: str, format: str, rule: str) -> np.ndarray:
    """Detectron2's `read_image`, `(H, W, C)`, which deep images reach scaled by a rule."""
    return utils.read_image(readable(path, rule), format)


def _is_gray(file: Image.Image) -> bool:
    return file.mode in ("I", "F") or file.mode.startswith("I;16")


def _colours(file: Image.Image) -> re.Match[str] | None:
    """The match of `_COLOURS` for the file's way to store pixels."""
    tiles = getattr(file, "tile", None) if file.format in ("PNG", "TIFF") else None
    if not tiles:
        return None
    arguments = tiles[0][3]
    name = arguments if isinstance(arguments, str) else arguments[0]
    return _COLOURS.fullmatch(name) if isinstance(name, str) else None


def _type_range(file: Image.Image, tags: Mapping[int, Any]) -> tuple[float, float]:
    """The smallest and the largest value of the file's type; 0 and 1 for floats."""
    if file.mode == "F":
        return 0.0, 1.0
    is_wide = file.mode == "I" and file.format not in ("PNG", "PPM")
    bits = int(tags[_BITS][0]) if _BITS in tags else (32 if is_wide else 16)
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) or (is_wide and _BITS not in tags):
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _no_data(tags: Mapping[int, Any]) -> float:
    """The value of pixels without data, or NaN."""
    try:
        return float(str(tags.get(_NO_DATA, "nan")).strip("\0 "))
    except ValueError:
        return math.nan


def _read_values(file: Image.Image, stream: IO[bytes]) -> np.ndarray:
    """The values, `(H, W)` or `(H, W, 3)`."""
    colours = _colours(file)
    if colours is None or _is_gray(file):
        values = np.asarray(file)
        is_unsigned = _type_range(file, dict(getattr(file, "tag_v2", {})))[1] == 2.0**32 - 1
        return values.view(np.uint32) if is_unsigned else values  # Pillow has signed ones only
    if colours[1] == "LA":  # four bytes a pixel, as in RGBA
        pixels: np.ndarray = _decode(file, "RGBA").astype(np.uint16)
        return pixels[..., 0] << 8 | pixels[..., 1]
    layout = colours[1].replace("a", "X")  # not divided by alpha
    upper: np.ndarray = _decode(file, f"{layout};16{colours[2]}").astype(np.uint16)
    stream.seek(0)
    with Image.open(stream) as again:
        lower = _decode(again, f"{layout};16{_LOWER[colours[2]]}")
    return (upper << 8 | lower)[..., :3]


def _decode(file: Any, layout: str) -> np.ndarray:
    """The 8-bit values of a file whose bytes are taken for another layout of pixels."""
    file._mode = "RGB" if layout.startswith("RGB;") else "RGBX" if "X" in layout else "RGBA"
    tiles = []
    for tile in file.tile:
        arguments = layout if isinstance(tile[3], str) else (layout, *tile[3][1:])
        tiles.append(getattr(tile, "_make", tuple)((*tile[:3], arguments)))  # a tuple in Pillow 10
    file.tile = tiles
    return np.asarray(file)


def _scaled(values: np.ndarray, low: float, high: float, no_data: float, rule: str) -> np.ndarray:
    """Values as 0...255: those from `low` to `high`, or from percentile to percentile."""
    is_exact = values.dtype.kind == "f" or values.dtype.itemsize <= 2
    values = values.astype(np.float32 if is_exact else np.float64)
    valid = np.isfinite(values)
    if not math.isnan(no_data):
        valid &= ~np.isclose(values, no_data, rtol=1e-6, atol=0)
    if rule == "percentile" and valid.any():
        known = values[valid]
        low, high = np.percentile(known, _PERCENTILES)
        if low == high:  # a few bright pixels on a plain ground
            low, high = known.min(), known.max()
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip((values - low) / (high - low or 1), 0, 1)
    return np.where(valid, np.rint(scaled * 255), 0).astype(np.uint8)


class _EightBit(PathHandler):
    """Opens `<prefix><path>` as a file of the image scaled by the rule in the prefix."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX.format(rule) for rule in RULES]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[bytes]:
        rule = next(rule for rule in RULES if path.startswith(_PREFIX.format(rule)))
        with PathManager.open(path.removeprefix(_PREFIX.format(rule)), "rb") as stream:
            picture = as_8_bit(stream, rule)
        buffer = io.BytesIO()
        picture.save(buffer, "PPM")  # without compression
        buffer.seek(0)
        return buffer


PathManager.register_handler(_EightBit(), allow_override=True)
