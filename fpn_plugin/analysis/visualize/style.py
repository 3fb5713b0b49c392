"""Colours and sizes that all parts of a picture share; lengths are in inches, text in points."""

from __future__ import annotations

# bright, as they are drawn on photos; neighbouring levels are far apart
_LEVELS = {2: "#ffd400", 3: "#ff4fa3", 4: "#00c8ff", 5: "#ff7a1a", 6: "#7ee22b", 7: "#b98cff"}
_OTHERS = ("#3dffb5", "#ff3b3b", "#5a8cff")
UNKNOWN = "#c9d1d9"
INK, SOFT, LINE = "#1d2733", "#5b6875", "#d9dfe6"
TITLE, TEXT, SMALL = 10.0, 8.0, 7.0
FONT = "DejaVu Sans"


def level_colour(level: int | None) -> str:
    """The colour of a level; None is a level that nobody knows."""
    if level is None:
        return UNKNOWN
    return _LEVELS.get(level, _OTHERS[level % len(_OTHERS)])


def level_name(level: int | None) -> str:
    """What a legend calls a level."""
    return "level unknown" if level is None else f"level {level} (stride {2**level})"
