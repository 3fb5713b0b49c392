"""What a warm start says of every node: copied, adapted, fresh; and whether the function stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

from fpn_plugin.pyramid.warm import PREFIX

COPIED, ADAPTED, FRESH = "copied", "adapted", "fresh"
EXACTLY, ROUNDED, LOST = "exactly", "up to rounding", "no"


@dataclass(frozen=True)
class Row:
    """What became of one tensor of the model.

    Attributes:
        group: the node, or the part of the detector, that it belongs to.
        kind: `COPIED`, `ADAPTED` or `FRESH`.
        remark: how it was adapted, whose copy it is, or why it is fresh.
        own: whether it belongs to what the checkpoint computes.
    """

    name: str
    group: str
    kind: str
    remark: str = ""
    own: bool = True


def few(names: Sequence[str], count: int = 3) -> str:
    """The first of some names."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def node_lines(rows: Iterable[Row], nodes: Iterable[str]) -> list[str]:
    """A line per node and per part of the detector.

    Args:
        nodes: of the pyramid, also those that have nothing to learn.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for name in nodes:
        groups.setdefault(name, [])
    return [_line(_label(name), _summary(found)) for name, found in groups.items()]


def verdict_lines(kept: Mapping[str, str], gates: Mapping[str, str]) -> list[str]:
    """A line per level of the pyramid, and one for the detector.

    Args:
        kept: `EXACTLY`, `ROUNDED` or `LOST` by level, and for "the detector".
        gates: of each level that the checkpoint's pyramid gives as well; "" where it has none.
    """
    lines = []
    for name, how in kept.items():
        text = f"the checkpoint's function: {how}"
        if name in gates:
            text += f" ({gates[name]} lets the new pyramid in)" if gates[name] else " (as it was)"
        lines.append(_line(name, text))
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<28} {text}"


def _label(name: str) -> str:
    return f"{name[len(PREFIX):]} (old)" if name.startswith(PREFIX) else name


def _summary(rows: list[Row]) -> str:
    if not rows:
        return "nothing to learn"
    texts = []
    for kind in (COPIED, ADAPTED, FRESH):
        of_kind = [row for row in rows if row.kind == kind]
        remarks = list(dict.fromkeys(row.remark for row in of_kind if row.remark))
        if of_kind:
            count = "" if len(of_kind) == len(rows) else f" {len(of_kind)} of {len(rows)}"
            texts.append(f"{kind}{count}" + (f" ({few(remarks, 2)})" if remarks else ""))
    return ", ".join(texts)
