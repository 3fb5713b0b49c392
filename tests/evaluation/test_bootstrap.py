"""AP on drawn images equals pycocotools' on such a set; differences that can be worked out."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import detect, write_truth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.evaluation.bootstrap import (
    MIN_IMAGES,
    Matches,
    Sample,
    _student,
    average_precision,
    difference,
    draw_images,
    images_with_hits,
    matches_of,
)


def coco_of(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def evaluated(truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    coco = coco_of(copy.deepcopy(truth))
    evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def ap(evaluation: COCOeval) -> float:
    precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean() * 100)


def repeated(
    truth: dict[str, Any], results: list[dict[str, Any]], weights: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Each image as often as its weight says, with what is in it, under new ids."""
    content: dict[str, Any] = {**truth, "images": [], "annotations": []}
    detections = []
    for image, times in zip(truth["images"], weights):
        for _ in range(times):
            key = len(content["images"]) + 1
            content["images"].append({**image, "id": key})
            for annotation in truth["annotations"]:
                if annotation["image_id"] == image["id"]:
                    number = len(content["annotations"]) + 1
                    content["annotations"].append({**annotation, "id": number, "image_id": key})
            detections += [
                {**result, "image_id": key}
                for result in results
                if result["image_id"] == image["id"]
            ]
    return content, detections


def one_run(ap: float, draws: Any) -> Sample:
    return Sample(np.array([ap]), np.asarray(draws, dtype=float)[None])


def ap_of_draws(matches: list[Matches], draws: np.ndarray) -> np.ndarray:
    return np.array([average_precision(matches, weights) for weights in draws])


@pytest.mark.parametrize("weights", [[1] * 6, [0, 3, 1, 0, 2, 0], [6, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("categories", [2, 1])
def test_it_equals_pycocotools_on_a_set_with_the_images_repeated(
    tmp_path: Path, weights: list[int], categories: int
) -> None:
    """With one category the draws have no object of the other, which does not count then."""
    truth = write_truth(tmp_path / "truth.json")
    if categories == 1:
        truth["annotations"] = [
            annotation
            for annotation in truth["annotations"]
            if not weights[annotation["image_id"] - 1] or annotation["category_id"] == 3
        ]
    results = detect(truth, 0.3)
    matches = matches_of(evaluated(truth, results))
    wanted = ap(evaluated(*repeated(truth, results, np.array(weights))))
    assert 5 < wanted < 95
    drawn = average_precision(matches[:categories], np.array(weights))
    assert drawn == average_precision(matches, np.array(weights))
    assert drawn == pytest.approx(wanted, abs=1e-10)


def one_object_each(detected: list[int]) -> list[Matches]:
    """Two images with an object in each, one IoU threshold; those `detected` have a detection."""
    hits = np.ones((1, len(detected)), dtype=bool)
    return [Matches(np.array(detected, dtype=int), hits, ~hits, np.array([1, 1]))]


def test_a_tiny_example_worked_out_by_hand() -> None:
    both, first = one_object_each([0, 1]), one_object_each([0])
    half = 100 * 51 / 101  # of the recalls 0, 0.01 … 1 those up to 0.5 are reached
    wanted = {(2, 0): (100, 100), (1, 1): (100, half), (0, 2): (100, 0)}
    for weights, (ap_of_both, ap_of_first) in wanted.items():
        assert average_precision(both, np.array(weights)) == pytest.approx(ap_of_both)
        assert average_precision(first, np.array(weights)) == pytest.approx(ap_of_first)
    draws = np.array(list(wanted))
    ours, theirs = ap_of_draws(both, draws), ap_of_draws(first, draws)
    result = difference(
        one_run(100.0, ours), one_run(half, theirs), 10**6
    )  # so many as to have 2.5% beyond
    # differences of 0, 100 - half and 100: better in two draws, equal in one
    assert result.better == pytest.approx(2.5 / 3)
    assert result.low == pytest.approx(0.05 * (100 - half), rel=1e-3)
    assert result.high == pytest.approx(100 - 0.05 * half, rel=1e-3)


def test_a_false_detection_that_ranks_first_halves_the_precision() -> None:
    image = np.array([1, 0])
    hits = np.array([[False, True]])
    matches = [Matches(image, hits, ~hits, np.array([1, 0]))]
    assert average_precision(matches, np.array([1, 1])) == pytest.approx(50)
    assert average_precision(matches, np.array([1, 0])) == pytest.approx(100)
    assert average_precision(matches, np.array([1, 3])) == pytest.approx(25)
    assert math.isnan(average_precision(matches, np.array([0, 2])))


def test_equal_runs_differ_by_exactly_nothing(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.json")
    matches = matches_of(evaluated(truth, detect(truth, 0.3)))
    draws = draw_images(6, 50)
    aps = ap_of_draws(matches, draws)
    result = difference(one_run(3.0, aps), one_run(3.0, aps.copy()), MIN_IMAGES)
    assert (result.value, result.low, result.high, result.better) == (0, 0, 0, 0.5)
    assert result.verdict == "tie" and not result.significant
    assert aps.std() > 0


def test_a_run_that_is_better_in_every_image_is_better_in_every_draw(tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "truth.json")
    draws = draw_images(6, 50)
    good, bad = (
        ap_of_draws(matches_of(evaluated(truth, detect(truth, error))), draws)
        for error in (0.0, 0.5)
    )
    result = difference(one_run(2.0, good), one_run(1.0, bad), MIN_IMAGES)
    assert result.better == 1.0
    assert result.verdict == "better" and result.significant and result.low > 0
    turned = difference(one_run(1.0, bad), one_run(2.0, good), MIN_IMAGES)
    assert turned.better == 0 and turned.verdict == "worse"
    assert (turned.low, turned.high) == pytest.approx((-result.high, -result.low))


def test_draws_without_objects_say_nothing() -> None:
    result = difference(one_run(2.0, [math.nan, 3.0]), one_run(1.0, [math.nan, 2.0]), 99)
    assert (result.low, result.high, result.better) == (1.0, 1.0, 1.0)
    nothing = difference(one_run(2.0, [math.nan]), one_run(1.0, [math.nan]), 99)
    assert math.isnan(nothing.low) and nothing.verdict == "too few images"


def test_intervals_of_few_images_are_wider() -> None:
    """By Student's t (2.262 for 10 images) and the root of 10/9, 0.855% of a normal distribution."""
    draws = np.random.default_rng(0).normal(0, 1, 10**6)
    few, many = (
        difference(one_run(1.0, draws), one_run(0.5, np.zeros(10**6)), n) for n in (10, 10**6)
    )
    assert few.high == pytest.approx(2.262 * (10 / 9) ** 0.5, rel=0.01)
    assert many.high == pytest.approx(1.96, rel=0.01)


@pytest.mark.parametrize(
    "aps, draws, images, verdict",
    [
        ((1.3, 0.0), [1.0, 1.1, 1.5], 6, "too few images"),
        ((1.3, 0.0), [1.0, 1.1, 1.5], MIN_IMAGES, "better"),
        ((10.04, 9.96), [0.07, 0.08, 0.09], MIN_IMAGES, "tie"),  # 10.0 both
        ((10.06, 9.96), [0.09, 0.10, 0.11], MIN_IMAGES, "better"),  # 10.1 and 10.0
        ((12.0, 11.0), [-1.0, 1.0, 2.0], MIN_IMAGES, "inconclusive"),
        ((math.nan, 11.0), [1.0, 1.0], MIN_IMAGES, "unknown"),
    ],
)
def test_verdicts(aps: tuple[float, float], draws: list[float], images: int, verdict: str) -> None:
    result = difference(one_run(aps[0], draws), one_run(aps[1], np.zeros(len(draws))), images)
    assert result.verdict == verdict and result.images == images
    assert result.significant == (verdict == "better")
    if verdict in ("too few images", "unknown"):
        assert all(math.isnan(end) for end in (result.low, result.high, result.better))


def test_images_with_hits_are_those_that_have_a_say(tmp_path: Path) -> None:
    """Neither an image without objects counts, nor one in which nobody finds any."""
    truth = write_truth(tmp_path / "truth.json")
    hits = [result for result in detect(truth, 0.0) if result["image_id"] in (1, 4)]
    misses = [{**result, "bbox": [0, 0, 1, 1]} for result in detect(truth, 0.0)]
    runs = [matches_of(evaluated(truth, results)) for results in (hits, misses)]
    assert images_with_hits(runs) == 2 and images_with_hits(runs[1:]) == 0
    assert images_with_hits([one_object_each([0]), one_object_each([0, 1])]) == 2


def test_draws_are_of_as_many_images_and_the_same_every_time() -> None:
    draws = draw_images(12, 200)
    assert draws.shape == (200, 12)
    assert (draws.sum(axis=1) == 12).all()
    assert (draws == draw_images(12, 200)).all()
    # an image is left out of a draw with a probability of (11/12)^12 = 0.352
    assert (draws == 0).mean() == pytest.approx(0.352, abs=0.03)


def several_runs(aps: list[float], seeds: list[int], draws: int = 4) -> Sample:
    """On images that do not differ: each draw has what all images have."""
    return Sample(np.array(aps), np.repeat(np.array(aps)[:, None], draws, axis=1), seeds)


@pytest.mark.parametrize(
    "freedom, t", [(1, 12.7062), (2, 4.30265), (2.5, 3.57465), (9, 2.26216), (1e6, 1.95997)]
)
def test_students_t(freedom: float, t: float) -> None:
    assert _student(freedom) == pytest.approx(t, rel=1e-4)


def test_runs_of_the_same_seeds_are_paired() -> None:
    """Differences of 1, 2 and 3: a variance of 1, of the mean 1/3, two degrees of freedom."""
    ours = several_runs([11.0, 22.0, 33.0], [0, 1, 2])
    theirs = several_runs([30.0, 20.0, 10.0], [2, 1, 0])
    result = difference(ours, theirs, 50)
    assert (result.value, result.over) == (2.0, "images and seeds")
    assert result.high - 2 == 2 - result.low == pytest.approx(4.30265 / 3**0.5, rel=1e-4)
    assert result.verdict == "inconclusive" and result.better == 1.0


def test_runs_of_other_seeds_are_not() -> None:
    """Variances of the means of 1/3 and 4/3: Welch's degrees of freedom are 2.94."""
    ours, theirs = several_runs([1, 2, 3], [0, 1, 2]), several_runs([1, 3, 5], [7, 8, 9])
    variance, freedom = 5 / 3, (5 / 3) ** 2 / ((1 / 9 + 16 / 9) / 2)
    wanted = _student(freedom) * variance**0.5
    result = difference(ours, theirs, 50)
    assert result.high - result.value == pytest.approx(wanted, rel=1e-6)
    drawn = [several_runs([1, 2, 3], seeds) for seeds in ([-1, -1, -1], [0, 1, 2])]
    assert difference(*drawn, 50).over == "images and seeds"
    alone = [several_runs([1, 2, 3], [0, 0, 0]), several_runs([1, 3, 5], [0, 1, 2])]
    assert difference(*alone, 50).over == "images"  # one seed, three times


def test_images_and_seeds_each_have_their_own_t() -> None:
    draws = np.random.default_rng(0).normal(0, 1, (1, 10**5)).repeat(2, axis=0)
    ours = Sample(np.array([0.0, 2.0]), draws, [0, 1])
    result = difference(ours, several_runs([0.0, 0.0], [0, 1], 10**5), 100)
    of_images, of_seeds = 1.98422 * (100 / 99) ** 0.5, 12.7062 * 1.0
    assert result.high - result.value == pytest.approx(math.hypot(of_images, of_seeds), rel=0.01)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("interaction", [0.0, 2.0])
def test_intervals_hold_the_truth_95_times_in_100(seeds: int, interaction: float) -> None:
    """A metric that is a mean over images: effects of image, seed, and of both together."""
    rng, images, held, tries = np.random.default_rng(1), 15, 0, 500
    draws = draw_images(images, 200) / images
    for _ in range(tries):
        effects = rng.normal(0, 1, images) + rng.normal(0, interaction, (2, seeds, images))
        effects = effects + rng.normal(0, 1, (2, seeds, 1)) + rng.normal(0, 1, (2, 1, images))
        ours, theirs = (Sample(x.mean(axis=1), x @ draws.T, range(seeds)) for x in effects)
        result = difference(ours, theirs, images)
        held += result.low <= 0 <= result.high
    assert held / tries >= 0.94
