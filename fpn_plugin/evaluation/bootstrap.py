"""Paired bootstrap over test images: AP on images drawn with replacement, the same for all runs.

pycocotools matches detections to objects once; the AP of each draw follows from these matches.
Where both configs were trained with several seeds, an interval is over images and seeds:
:func:`difference` says how.

Shapes: T IoU thresholds, D detections of a category in all images, I images, N draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Iterable, Sequence

import numpy as np

_RECALLS = np.linspace(0.0, 1.0, 101)  # as in pycocotools
_CONFIDENCE = 95  # percent of the draws within an interval

MIN_IMAGES = 10
"""Images with a hit that a verdict needs. Six images have 462 different draws in all, and their
interval would be made of the two or three most extreme of a thousand; ten have 92,378. In 400
simulated pairs of detectors with 10 images each, and with 12 and 20, the interval that is said to
hold the true difference 95 times in 100 held it 94 times; with 6 images 92 times."""

BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"
TIE, TOO_FEW, UNKNOWN = "tie", "too few images", "unknown"
IMAGES, IMAGES_AND_SEEDS = "images", "images and seeds"


@dataclass(frozen=True)
class Matches:
    """What pycocotools matched in one category, for objects of all sizes.

    Attributes:
        image: `(D,)` the index of each detection's image, in order of falling score.
        hits: `(T, D)` true positives.
        misses: `(T, D)` false positives; a detection on a crowd is neither.
        objects: `(I,)` the objects in each image, crowds left out.
    """

    image: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Difference of one config to another, in points of AP.

    Attributes:
        value: on the images as they are.
        low: the lower end of the 95% interval; nan where the images are too few.
        high: its upper end.
        better: the share of draws, of images and seeds, in which the first is better; a tie counts
            half.
        significant: whether the verdict is BETTER or WORSE.
        verdict: BETTER or WORSE if the interval excludes zero, else INCONCLUSIVE; TIE where both
            APs are the same as :func:`shown`; TOO_FEW with fewer than MIN_IMAGES images; UNKNOWN
            where an AP is.
        images: the images with a say, in which one of the two found an object.
        over: what the interval is over: "images", or "images and seeds".
    """

    value: float
    low: float
    high: float
    better: float
    significant: bool
    verdict: str
    images: int
    over: str = IMAGES


@dataclass(frozen=True)
class Sample:
    """The APs of one config's runs.

    Attributes:
        aps: `(R,)` of each run on the images as they are.
        draws: `(R, N)` on the draws, which are the same for all runs.
        seeds: of the runs; None where nothing is said of other seeds.
    """

    aps: np.ndarray
    draws: np.ndarray
    seeds: Sequence[int] | None = None


def shown(ap: float) -> str:
    """An AP as reports show it."""
    return "–" if math.isnan(ap) else f"{ap:.1f}"


def matches_of(evaluation: Any) -> list[Matches]:
    """The matches of each category in an evaluated COCOeval, from its first area range."""
    params = evaluation.params
    images, areas = len(params.imgIds), len(params.areaRng)
    # evalImgs is ordered by category, area range, image
    starts = range(0, len(params.catIds) * areas * images, areas * images)
    return [
        _join_images(evaluation.evalImgs[start : start + images], len(params.iouThrs))
        for start in starts
    ]


def _join_images(images: Sequence[dict[str, Any] | None], thresholds: int) -> Matches:
    """The matches of all images of a category; an image with neither is None."""
    objects = np.array(
        [
            0 if image is None else int((np.asarray(image["gtIgnore"]) == 0).sum())
            for image in images
        ]
    )
    present = [(i, image) for i, image in enumerate(images) if image is not None]
    empty: np.ndarray = np.zeros((thresholds, 0), dtype=bool)
    scores = np.concatenate([np.zeros(0), *(image["dtScores"] for _, image in present)])
    index = np.concatenate(
        [np.zeros(0, dtype=int), *(np.full(len(image["dtScores"]), i) for i, image in present)]
    )
    matched = np.concatenate([empty, *(image["dtMatches"] != 0 for _, image in present)], axis=1)
    ignored = np.concatenate([empty, *(image["dtIgnore"] != 0 for _, image in present)], axis=1)
    order = np.argsort(-scores, kind="mergesort")  # stable, to break ties as pycocotools does
    return Matches(
        index[order],
        (matched & ~ignored)[:, order],
        (~matched & ~ignored)[:, order],
        objects,
    )


def average_precision(categories: Sequence[Matches], weights: np.ndarray) -> float:
    """AP in percent on a set that repeats each image by its weight; nan without objects.

    It equals pycocotools' AP of such a set. There the copies of a detection follow one another in
    the ranking, and only the last copy can reach a recall with the best precision, so that a
    weighted cumulative sum stands for all copies.

    Args:
        weights: `(I,)` whole numbers.
    """
    values = []
    for category in categories:
        total = int((category.objects * weights).sum())
        if not total:
            continue
        copies = weights[category.image]
        hits = np.cumsum(category.hits * copies, axis=1, dtype=float)
        misses = np.cumsum(category.misses * copies, axis=1, dtype=float)
        precision = hits / (misses + hits + np.spacing(1))
        # interpolated: the best precision at this recall or a higher one
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        values.append(np.mean([_mean_at_recalls(*row) for row in zip(hits / total, precision)]))
    return float(np.mean(values) * 100) if values else math.nan


def _mean_at_recalls(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean precision at the 101 recalls; one that is not reached counts as 0."""
    places: Any = np.searchsorted(recall, _RECALLS, side="left")
    return float(precision[places[places < len(recall)]].sum()) / len(_RECALLS)


def draw_images(images: int, draws: int, seed: int = 0) -> np.ndarray:
    """`(N, I)`: how often each draw, of as many images with replacement, has each image."""
    return np.random.default_rng(seed).multinomial(images, [1 / images] * images, size=draws)


def images_with_hits(scores: Iterable[Sequence[Matches]]) -> int:
    """The images in which some of the runs found an object, by the lowest IoU threshold.

    Without a hit an image says nothing of which run is better, however many there are.

    Args:
        scores: the matches of each run.
    """
    pairs = [(matches.image, matches.hits[0]) for score in scores for matches in score]
    return len(set().union(*(image[hits].tolist() for image, hits in pairs)))


def difference(ours: Sample, theirs: Sample, images: int) -> Difference:
    """The difference of two configs from their APs on the same draws.

    With one seed, or none that is known, the interval is over images: the ends go out as far as
    Student's t and the variance's bias demand, as draws of few images differ too little from each
    other (the expanded percentile interval of Hesterberg, arXiv:1411.5279). In the simulations
    with 10 or 12 images as many as 10 in 100 intervals between the 2.5% ends missed the truth.

    With several seeds of both it is over images and seeds, two crossed random effects. The variance
    over images is that of the bootstrap of the mean over the runs; the variance over seeds comes
    from the runs' differences on all images, where runs of the same seeds are paired. The square
    of half the length is the sum of both, each times the square of Student's t for its own degrees
    of freedom, which are two with three seeds (a modified large-sample interval; Graybill and
    Wang, 1980). What images and seeds do together is in both, so it is rather too long: in
    simulations (`tests/evaluation/coverage.py`; 12 and 40 images, 2 to 5 seeds) it held the truth
    93 to 100 times in 100, the interval over images alone 36 to 96 times. The hierarchical
    bootstrap, which draws the seeds as it draws images (Owen, arXiv:0712.1111), held it 80 to 98
    times with two or three seeds.

    Args:
        images: of :func:`images_with_hits` for the runs of both.
    """
    means = float(np.mean(ours.aps)), float(np.mean(theirs.aps))
    value = means[0] - means[1]
    spread = _spread_over_seeds(ours, theirs)
    over = IMAGES if spread is None else IMAGES_AND_SEEDS
    differences = ours.draws.mean(axis=0) - theirs.draws.mean(axis=0)
    differences = differences[~np.isnan(differences)]  # draws without any object
    if math.isnan(value) or images < MIN_IMAGES or not len(differences):
        verdict = UNKNOWN if math.isnan(value) else TOO_FEW
        return Difference(value, math.nan, math.nan, math.nan, False, verdict, images, over)
    if spread is None:
        # the share of a normal distribution beyond t, of a variance that draws underestimate
        reach = _student(images - 1) * math.sqrt(images / (images - 1))
        tail = 100 * NormalDist().cdf(-reach)
        low, high = (float(end) for end in np.percentile(differences, [tail, 100 - tail]))
    else:
        variance = float(np.var(differences)) * images / (images - 1)
        reach = math.hypot(_student(images - 1) * math.sqrt(variance), spread)
        low, high = value - reach, value + reach
        differences = _draw_seeds(ours, theirs)
    better = float(np.mean(differences > 0) + np.mean(differences == 0) / 2)
    if shown(means[0]) == shown(means[1]):
        verdict = TIE
    else:
        verdict = BETTER if low > 0 else WORSE if high < 0 else INCONCLUSIVE
    significant = verdict in (BETTER, WORSE)
    return Difference(value, low, high, better, significant, verdict, images, over)


def has_several_seeds(seeds: Sequence[int] | None) -> bool:
    """A seed that was not set, -1, was drawn anew for each run."""
    seeds = seeds or ()
    return len({seed for seed in seeds if seed >= 0}) + sum(seed < 0 for seed in seeds) > 1


def _spread_over_seeds(ours: Sample, theirs: Sample) -> float | None:
    """Half the length of an interval over seeds alone; None where one of the two has one seed."""
    if not (has_several_seeds(ours.seeds) and has_several_seeds(theirs.seeds)):
        return None
    samples = [ours.aps, theirs.aps]
    if pairs := _paired(ours, theirs):
        samples = [np.array([ours.aps[run] - theirs.aps[other] for run, other in pairs])]
    variances = [float(np.var(sample, ddof=1)) / len(sample) for sample in samples]
    if not any(variances):
        return 0.0
    # Welch's, if there are two
    weighted = [v**2 / (len(sample) - 1) for v, sample in zip(variances, samples)]
    freedom = sum(variances) ** 2 / sum(weighted)
    return _student(freedom) * math.sqrt(sum(variances))


def _paired(ours: Sample, theirs: Sample) -> list[tuple[int, int]]:
    """The runs of the same seeds, if each seed is there once in both; else none."""
    first, second = list(ours.seeds or ()), list(theirs.seeds or ())
    is_same = sorted(first) == sorted(second) and len(set(first)) == len(first)
    if not is_same or min(first, default=-1) < 0:
        return []
    return [(run, second.index(seed)) for run, seed in enumerate(first)]


def _draw_seeds(ours: Sample, theirs: Sample) -> np.ndarray:
    """`(N,)` the differences with the runs drawn with replacement too, in pairs if there are."""
    generator, draws = np.random.default_rng(0), ours.draws.shape[1]

    def drawn(runs: int) -> np.ndarray:
        return generator.multinomial(runs, [1 / runs] * runs, size=draws).T / runs

    if pairs := _paired(ours, theirs):
        order = [other for _, other in pairs]
        differences = ((ours.draws - theirs.draws[order]) * drawn(len(pairs))).sum(axis=0)
    else:
        means = [(x.draws * drawn(len(x.draws))).sum(axis=0) for x in (ours, theirs)]
        differences = means[0] - means[1]
    return differences[~np.isnan(differences)]


def _student(freedom: float) -> float:
    """The quantile of Student's t that 95% are below in absolute value."""
    whole = math.sqrt(math.pi) / 2
    whole *= math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))

    def inside(t: float) -> float:
        """With t = sqrt(freedom) tan(angle) the density is a power of the cosine."""
        angles = np.linspace(0.0, math.atan(t / math.sqrt(freedom)), 2001)
        heights = np.cos(angles) ** (freedom - 1)
        return float((heights[1:] + heights[:-1]).sum() / 2 * angles[1]) / whole

    low, high = 0.0, 100.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < _CONFIDENCE / 100 else (low, middle)
    return high
