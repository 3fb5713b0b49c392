"""Mistakes of the user, which end in their message alone, and unexpected errors, which do not.

An error is a mistake if this package raised it on purpose: the last line of its traceback is a
`raise` of ours. An error of the operating system that names a file is one as well.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1])
# A frame of a traceback as text, and the line of source below it
_FRAME = re.compile(r'^  File "(?P<file>.+)", line \d+, in .+\n(?:    (?P<line>\S.*)\n)?', re.M)
_SYSTEM_ERROR = re.compile(r"\[Errno \d+\] .+: ['\"]")
_HEADER = "Traceback (most recent call last):\n"
# What a command prints before the message, as argparse does
PREFIX = "fpn {}: error: "
_PRINTED = re.compile(r"^fpn [\w-]+: error: ", re.M)


def mistake_of(error: BaseException) -> str:
    """The message of a mistake; "" if the error is unexpected.

    What a data loader's worker process raised is judged by the traceback that torch quotes.
    """
    text = str(error)
    if _HEADER in text:
        return mistake_in(text)
    if isinstance(error, OSError) and error.filename is not None:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = bool(frames) and _is_raised_here(frames[-1].filename, frames[-1].line or "")
    return text if is_ours and not isinstance(error, (AssertionError, NotImplementedError)) else ""


def mistake_in(trace: str) -> str:
    """The message of a mistake of another process, from its traceback; "" if it is unexpected."""
    last = trace.rpartition(_HEADER)[2]
    frames = list(_FRAME.finditer(last))
    if not frames:
        return ""
    # "fpn_plugin.data.coco_json.DatasetError: message", maybe of several lines
    message = re.sub(r"^(\s*[\^~]+\n)?[\w.]+: ", "", last[frames[-1].end() :].strip("\n"), count=1)
    file, line = frames[-1]["file"], frames[-1]["line"] or ""
    is_mistake = _is_raised_here(file, line) or _SYSTEM_ERROR.match(message)
    return message if is_mistake else ""


def printed_mistake(output: str) -> str:
    """The message that a command has printed at the end of its output; "" if there is none."""
    found = list(_PRINTED.finditer(output))
    return output[found[-1].end() :].strip() if found else ""


def _is_raised_here(file: str, line: str) -> bool:
    return file.startswith(_PACKAGE) and line.strip().startswith("raise ")
