"""Checks of `MODEL.FPN` and of the pixels' keys, and the keys in the errors of a pyramid."""

from __future__ import annotations

import logging
import math
import re
from contextlib import contextmanager
from typing import Iterator

from detectron2.config import CfgNode

from fpn_plugin.config.settings import SECTION, pyramid_keys, read_settings
from fpn_plugin.registry import ArgumentError, UnknownNameError, unknown_name

logger = logging.getLogger(__name__)

# of Detectron2's own formats, and those of Pillow's that have 8 bits and that it converts to
_CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "L": 1, "LA": 2}
_CHANNELS |= {"HSV": 3, "YCbCr": 3, "CMYK": 4, "RGBA": 4}
_OTHER_ARGUMENTS = {"warm_from": "WARM_START_FROM"}


@contextmanager
def keys_in_errors() -> Iterator[None]:
    """Let the errors of a pyramid, which speak of its arguments, name the keys of `MODEL.FPN`.

    `extra_levels: ...` becomes `MODEL.FPN.EXTRA_LEVELS: ...`, and so do the arguments that stand
    between backquotes in the message.
    """
    try:
        yield
    except (ArgumentError, UnknownNameError) as error:
        keys = {key.lower(): f"{SECTION}.{key}" for key in pyramid_keys()}
        keys |= {name: f"{SECTION}.{key}" for name, key in _OTHER_ARGUMENTS.items()}
        first = re.match(r"\w*", error.argument)[0]  # type: ignore[index]
        if first not in keys:
            raise
        text = keys[first] + str(error)[len(first) :]
        text = re.sub(r"`(\w+)`", lambda match: keys.get(match[1], match[0]), text)
        raise type(error)(text) from error


def validate_config(cfg: CfgNode) -> None:
    """Check the keys of `MODEL.FPN` that can be checked without building anything, and those of
    the pixels: :func:`check_pixels`.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and the choices.
    """
    check_pixels(cfg)
    with keys_in_errors():
        read_settings(cfg).check()


def check_pixels(cfg: CfgNode) -> None:
    """Check that `MODEL.PIXEL_MEAN` and `MODEL.PIXEL_STD` fit the channels of `INPUT.FORMAT`.

    With an `INPUT.FORMAT` of "", for a mapper of one's own, they only have to fit each other.

    Raises:
        KeyError: for an unknown `INPUT.FORMAT`.
        ValueError: naming the key and the value.
    """
    order = cfg.INPUT.FORMAT
    if order and order not in _CHANNELS:
        raise unknown_name("INPUT.FORMAT", order, _CHANNELS)
    channels = _CHANNELS[order] if order else len(cfg.MODEL.PIXEL_MEAN)
    name = f"INPUT.FORMAT {order}" if order else "MODEL.PIXEL_MEAN"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = list(cfg.MODEL[key])
        if len(values) != channels:
            one = " (INPUT.FORMAT L is for gray images)" if len(values) == 1 else ""
            raise ValueError(
                f"MODEL.{key} {values} has {len(values)} value{'s' * (len(values) != 1)}, but"
                f" {name} has {channels} channel{'s' * (channels != 1)}: give a value"
                f" for each channel{one}; INPUT.FORMAT '' is for a mapper of your own"
            )
        is_number = [isinstance(x, (int, float)) and math.isfinite(x) for x in values]
        if not all(is_number) or (key == "PIXEL_STD" and min(values) <= 0):
            wanted = "positive numbers" if key == "PIXEL_STD" else "numbers"
            raise ValueError(f"MODEL.{key} {values}: must be {wanted}, in grey levels of 0 to 255")
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if order != "YUV-BT.601" and max(mean) <= 1 and max(std) < 1:
        logger.warning(
            "MODEL.PIXEL_MEAN %s and MODEL.PIXEL_STD %s look like values for pixels of 0 to 1, but"
            " pixels are 0 to 255 here: multiply them by 255",
            *(list(mean), list(std)),
        )
