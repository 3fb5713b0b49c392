"""Objects by size and by level. The size is the square root of the box's area, in pixels."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fpn_plugin.analysis.visualize.style import INK, SMALL, TEXT, level_colour, level_name

Level = int | None


def octave(size: float) -> int:
    """Sizes from `2**k` to below `2**(k + 1)` are in octave k; below a pixel in octave 0."""
    return math.floor(math.log2(size)) if size >= 1 else 0


def count(sizes: Sequence[float], levels: Sequence[Level]) -> dict[Level, Counter[int]]:
    """How many objects of each level are in each octave; levels ascending, unknown ones last."""
    found: dict[Level, Counter[int]] = {}
    for level in sorted(set(levels), key=lambda level: (level is None, level or 0)):
        chosen = [octave(size) for size, of in zip(sizes, levels) if of == level]
        found[level] = Counter(chosen)
    return found


def draw_histogram(
    axes: Axes,
    sizes: Sequence[float],
    levels: Sequence[Level],
    truth: Sequence[float] | None,
    zoom: float = 1.0,
) -> None:
    """Detections as bars, stacked by level; the truth as an outline.

    Args:
        sizes: of the detections.
        levels: of the detections.
        truth: sizes of the true objects; None if nobody knows them.
        zoom: by how much the image was enlarged before the model saw it, which decides the levels.
    """
    counts = count(sizes, levels)
    true = Counter(map(octave, truth or []))
    octaves = {octave for counter in (*counts.values(), true) for octave in counter} or {4, 5}
    places = range(min(octaves), max(octaves) + 1)
    floor = [0] * len(places)
    for level, counter in counts.items():
        amount = [counter[place] for place in places]
        style: dict[str, Any] = {
            "facecolor": level_colour(level),
            "edgecolor": INK,
            "linewidth": 0.5,
        }
        axes.bar(places, amount, 0.8, floor, label=level_name(level), **style)
        floor = [low + more for low, more in zip(floor, amount)]
    if truth is not None:
        _draw_outline(axes, places, true)
    axes.set_xticks([place - 0.5 for place in (*places, places[-1] + 1)])
    axes.set_xticklabels([str(2**place) for place in (*places, places[-1] + 1)])
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    entries = len(counts) + (truth is not None)
    axes.set_ylim(
        0, (1.05 + 0.09 * entries) * max([1, *floor, *true.values()])
    )  # the legend's room
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    seen = "" if abs(zoom - 1) < 0.005 else f" (the model saw it × {zoom:.2g})"
    axes.set_xlabel(f"√(box area), pixels of the image{seen}", fontsize=TEXT)
    axes.set_ylabel("objects", fontsize=TEXT)
    if counts or truth is not None:
        axes.legend(loc="upper right", fontsize=SMALL, frameon=False, borderaxespad=0)


def _draw_outline(axes: Axes, places: Sequence[int], true: Mapping[int, int]) -> None:
    edges = [place - 0.5 for place in (*places, places[-1] + 1)]
    amount = [true[place] for place in places]
    style: dict[str, Any] = {"color": INK, "linewidth": 1.4, "linestyle": (0, (4, 2))}
    axes.stairs(amount, edges, label="ground truth", zorder=3, **style)
