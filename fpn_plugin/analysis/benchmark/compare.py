"""A report against an older one: what must not grow, and what may but is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from fpn_plugin.analysis.benchmark.run import SCHEMA

COMPARE = "--compare"
BYTES_ROOM = 0.1
"""Peak bytes may differ by so much at least: layouts are the processor's choice."""
_SAME = ("size", "batch", "device")


def read_report(path: str) -> dict[str, Any]:
    """A report.json.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no report, or one of another schema.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{COMPARE} {path!r} does not exist")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{COMPARE} {path!r} is no JSON: {error}") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{COMPARE} {path!r} is of schema {schema!r}; this version reads {SCHEMA}")
    return report


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], threshold: float
) -> tuple[list[str], list[str]]:
    """What got worse.

    Args:
        old: a report.
        new: another, with the same image size, batch and device.
        threshold: a count may grow by this part of itself.

    Returns:
        regressions of counts, each naming the config and the figure; and what is worth a warning:
        times beyond the threshold, and contestants that only the old one has.

    Raises:
        ValueError: if the two cannot be compared.
    """
    for key in _SAME:
        if old["settings"][key] != new["settings"][key]:
            raise ValueError(
                f"{COMPARE}: the old report was made with {key} {old['settings'][key]!r}, this one"
                f" with {new['settings'][key]!r}"
            )
    shared = [name for name in old["counts"] if name in new["counts"]]
    if not shared:
        raise ValueError(
            f"{COMPARE}: the two have no counts of the same config: {sorted(old['counts'])} and"
            f" {sorted(new['counts'])} (was --what counts left out?)"
        )
    regressions = [
        _grown(name, figure, was, new["counts"][name][figure])
        for name in shared
        for figure, was in old["counts"][name].items()
        if figure in new["counts"][name]
        and new["counts"][name][figure] > was * (1 + _room(figure, threshold))
    ]
    told = [f"{name} is in the old report only" for name in old["counts"] if name not in shared]
    return regressions, told + _slower(old, new, threshold)


def _room(figure: str, threshold: float) -> float:
    return max(threshold, BYTES_ROOM) if figure.endswith("bytes") else threshold


def _grown(name: str, figure: str, was: float, now: float) -> str:
    share = f"+{now / was - 1:.1%}" if was else "from nothing"
    return f"{name}: {figure} grew from {was:,.10g} to {now:,.10g} ({share})"


def _slower(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float) -> list[str]:
    """Ratios and not seconds, which another machine or another day changes."""
    found = []
    for section, rows in new["timings"].items():
        before = {
            (row["contestant"], row["reference"]): row["value"]
            for row in old["timings"].get(section, {}).get("ratios", [])
        }
        for row in rows["ratios"]:
            was, now = before.get((row["contestant"], row["reference"])), row["value"]
            if was and now and row["high"] < was * (1 - threshold):
                found.append(
                    f"{section}: {row['contestant']} was {was:.2f} times as fast as"
                    f" {row['reference']} and is {now:.2f} times now"
                )
    return found
