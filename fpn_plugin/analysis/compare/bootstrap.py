"""Is one config better than another? AP on images drawn anew, the same ones for all runs.

Shapes: T IoU thresholds, D detections of a category in all images, I images, N draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import numpy as np

_RECALLS = np.linspace(0.0, 1.0, 101)  # pycocotools' own
_LEVEL = 95  # percent of the draws that an interval holds


@dataclass(frozen=True)
class Matches:
    """What pycocotools matched in one category, objects of all sizes.

    Attributes:
        image: `(D,)` the number of each detection's image, in order of falling score.
        hits: `(T, D)` whether it found an object.
        misses: `(T, D)` whether it found none; one on a crowd is neither.
        objects: `(I,)` how many there are to be found in each image.
    """

    image: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Of one config to another, in points of AP.

    Attributes:
        value: on the images as they are.
        low: the lower end of the interval that holds 95% of the draws.
        high: its upper end.
        better: the share of draws in which it is better; one in which both are equal is half.
    """

    value: float
    low: float
    high: float
    better: float

    @property
    def told(self) -> bool:
        """Whether the images tell a difference: the interval does not hold zero."""
        return self.low > 0 or self.high < 0


def matches_of(evaluation: Any) -> list[Matches]:
    """By category, from a COCOeval that has evaluated; its first area range is taken."""
    params = evaluation.params
    images, areas = len(params.imgIds), len(params.areaRng)
    found = []
    for k in range(len(params.catIds)):
        start = k * areas * images
        found.append(_join(evaluation.evalImgs[start : start + images], len(params.iouThrs)))
    return found


def _join(images: Sequence[dict[str, Any] | None], thresholds: int) -> Matches:
    objects = np.array(
        [0 if one is None else int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in images]
    )
    some = [(i, one) for i, one in enumerate(images) if one is not None]
    empty: np.ndarray = np.zeros((thresholds, 0), dtype=bool)
    scores = np.concatenate([np.zeros(0), *(one["dtScores"] for _, one in some)])
    image = np.concatenate(
        [np.zeros(0, dtype=int), *(np.full(len(one["dtScores"]), i) for i, one in some)]
    )
    matched = np.concatenate([empty, *(one["dtMatches"] != 0 for _, one in some)], axis=1)
    ignored = np.concatenate([empty, *(one["dtIgnore"] != 0 for _, one in some)], axis=1)
    order = np.argsort(-scores, kind="mergesort")  # as pycocotools, to break ties in its way
    return Matches(
        image[order],
        (matched & ~ignored)[:, order],
        (~matched & ~ignored)[:, order],
        objects,
    )


def average_precision(categories: Sequence[Matches], weights: np.ndarray) -> float:
    """AP in percent where each image is there as often as its weight says; nan without objects.

    It is what pycocotools gives for such a set of images. Its copies of a detection follow one
    another, and only the last of them can be where a recall is reached with the best precision.

    Args:
        weights: `(I,)` whole numbers.
    """
    values = []
    for one in categories:
        total = int((one.objects * weights).sum())
        if not total:
            continue
        times = weights[one.image]
        hits = np.cumsum(one.hits * times, axis=1, dtype=float)
        misses = np.cumsum(one.misses * times, axis=1, dtype=float)
        precision = hits / (misses + hits + np.spacing(1))
        # the best precision at this recall or a higher one
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        values.append(np.mean([_at_recalls(*row) for row in zip(hits / total, precision)]))
    return float(np.mean(values) * 100) if values else math.nan


def _at_recalls(recall: np.ndarray, precision: np.ndarray) -> float:
    places: Any = np.searchsorted(recall, _RECALLS, side="left")
    return float(precision[places[places < len(recall)]].sum()) / len(_RECALLS)


def draw_images(images: int, draws: int, seed: int = 0) -> np.ndarray:
    """`(N, I)`: how often each image is there in each draw of as many images with replacement."""
    return np.random.default_rng(seed).multinomial(images, [1 / images] * images, size=draws)


def ap_of_draws(
    categories: Sequence[Matches], draws: np.ndarray, step: Callable[[int], None]
) -> np.ndarray:
    """`(N,)` AP in percent of one run on each draw; `step` gets the number of those done."""
    values = np.empty(len(draws))
    for i, weights in enumerate(draws, 1):
        values[i - 1] = average_precision(categories, weights)
        step(i)
    return values


def difference(value: float, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Of two configs from their APs on the same draws, `(N,)` each.

    Args:
        value: the difference on the images as they are.
    """
    found = ours - theirs
    found = found[~np.isnan(found)]  # a draw without any object says nothing
    if not len(found):
        return Difference(value, math.nan, math.nan, math.nan)
    rest = (100 - _LEVEL) / 2
    low, high = np.percentile(found, [rest, 100 - rest])
    better = float(np.mean(found > 0) + np.mean(found == 0) / 2)
    return Difference(value, float(low), float(high), better)
