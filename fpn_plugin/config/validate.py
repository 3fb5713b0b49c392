"""Checks of `MODEL.FPN`, and its keys in the errors of a pyramid."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Iterator

from detectron2.config import CfgNode

from fpn_plugin.config.settings import SECTION, pyramid_keys, read_settings
from fpn_plugin.registry import ArgumentError, UnknownNameError

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
    """Check the keys of `MODEL.FPN` that can be checked without building anything.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and the choices.
    """
    with keys_in_errors():
        read_settings(cfg).check()
