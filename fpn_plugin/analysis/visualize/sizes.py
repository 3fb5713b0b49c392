"""Which level finds objects of which size, over many images: each true object is counted where it
was found. The size is the square root of the box's area, in pixels of the image."""

from __future__ import annotations

from collections import Counter
from typing import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou

from fpn_plugin.analysis.report.table import Table
from fpn_plugin.analysis.visualize.histogram import Level, octave
from fpn_plugin.analysis.visualize.picture import Shown

_IOU = 0.5
MISSED = -1


def sizes_table(shown: Sequence[Shown]) -> Table | None:
    """A row per octave of sizes of the true objects: how many there are, and how many were found
    from each level; None if the truth is known for no image.

    An object is found by the best-scored detection of its class that overlaps it by an IoU of 0.5
    or more and has found no other.
    """
    known = [item for item in shown if item.truth is not None]
    if not known:
        return None
    counts: Counter[tuple[int, Level]] = Counter()
    for item in known:
        for thing, level in zip(item.truth or (), finders(item)):
            counts[octave(thing.size), level] += 1
    levels = sorted(
        {level for _, level in counts if level != MISSED}, key=lambda level: (level is None, level)
    )
    rows = []
    for place in sorted({place for place, _ in counts}):
        total = sum(number for (other, _), number in counts.items() if other == place)
        cells = [str(counts[place, level]) for level in (*levels, MISSED)]
        rows.append([f"{2**place} to {2**(place + 1)} px", str(total), *cells])
    names = ["level unknown" if level is None else f"level {level}" for level in levels]
    note = (
        f"True objects of {len(known)} images by the square root of their box's area, and the"
        f" level that the detection came from that found them (IoU ≥ {_IOU}, the same class)."
    )
    return Table("Sizes and levels", ["size", "objects", *names, "missed"], rows, note)


def finders(item: Shown) -> list[Level]:
    """The level that found each true object of an image, or MISSED."""
    truth = item.truth or ()
    found: list[Level] = [MISSED] * len(truth)
    free = set(range(len(truth)))
    overlaps = pairwise_iou(_boxes(item.found), _boxes(truth))  # (detections, objects)
    for i in sorted(range(len(item.found)), key=lambda i: -item.found[i].score):
        fit = [
            j
            for j in free
            if overlaps[i, j] >= _IOU and truth[j].category == item.found[i].category
        ]
        if fit:
            best = max(fit, key=lambda j: float(overlaps[i, j]))
            free.remove(best)
            found[best] = item.levels[i]
    return found


def _boxes(things: Sequence) -> Boxes:
    return Boxes(torch.tensor([thing.box for thing in things], dtype=torch.float32).reshape(-1, 4))
