"""How often the intervals of `fpn compare` hold the true difference, on simulated detectors.

python tests/evaluation/coverage.py [--tries 200]

Images have objects of different difficulty. A detector has a quality, which a seed of its training
shifts, for all images and for each image by itself. Half an hour.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fpn_plugin.evaluation.bootstrap import (
    Matches,
    Sample,
    average_precision,
    difference,
    draw_images,
)

THRESHOLDS = (-0.8, -0.2, 0.4, 1.0)
GAP = 0.2  # between the qualities of the two detectors
DRAWS = 200


def detect(objects: list[np.ndarray], quality: float, rng: Any, by_image: float) -> Matches:
    """What one training finds."""
    images, scores, hits = [], [], []
    for image, difficulties in enumerate(objects):
        shift = rng.normal(0, by_image)
        for difficulty in difficulties:
            fit = quality + shift - difficulty + rng.normal(0, 0.7)
            if fit > -1.0:
                images.append(image)
                scores.append(fit + rng.normal(0, 0.8))
                hits.append([fit > threshold for threshold in THRESHOLDS])
        for _ in range(rng.poisson(1.5)):
            images.append(image)
            scores.append(rng.normal(-0.8, 0.8))
            hits.append([False] * len(THRESHOLDS))
    order = np.argsort(-np.array(scores))
    found = np.array(hits, dtype=bool).reshape(-1, len(THRESHOLDS)).T[:, order]
    counts = np.array([len(difficulties) for difficulties in objects])
    return Matches(np.array(images)[order], found, ~found, counts)


def train_both(images: int, seeds: int, by_seed: float, by_image: float, rng: Any) -> list[Any]:
    """Two detectors, each trained with some seeds, on the same test images."""
    objects = [rng.normal(rng.normal(0, 0.5), 0.7, size=1 + rng.poisson(6)) for _ in range(images)]
    return [
        [detect(objects, gap + rng.normal(0, by_seed), rng, by_image) for _ in range(seeds)]
        for gap in (GAP, 0.0)
    ]


def sample(runs: list[Matches], weights: np.ndarray, seeds: Any) -> Sample:
    whole = np.ones(weights.shape[1], dtype=int)
    return Sample(
        np.array([average_precision([run], whole) for run in runs]),
        np.array([[average_precision([run], each) for each in weights] for run in runs]),
        seeds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=200)
    tries = parser.parse_args().tries
    print("| images | seeds | by seed | by image | over images and seeds | over images alone |")
    print("|---|---|---|---|---|---|", flush=True)
    for seeds, images in ((3, 12), (3, 40), (2, 12), (5, 12)):
        for by_seed, by_image in ((0.0, 0.2), (0.15, 0.2), (0.3, 0.3)):
            rng = np.random.default_rng(99)
            whole = np.ones(images, dtype=int)
            gaps = []
            for _ in range(1200):
                (one,), (other,) = train_both(images, 1, by_seed, by_image, rng)
                gaps.append(average_precision([one], whole) - average_precision([other], whole))
            truth, held = float(np.mean(gaps)), np.zeros(2)
            for number in range(tries):
                weights = draw_images(images, DRAWS, number)
                both = train_both(images, seeds, by_seed, by_image, rng)
                for place, known in enumerate((range(seeds), None)):
                    pair = [sample(runs, weights, known) for runs in both]
                    result = difference(*pair, images)
                    held[place] += result.low <= truth <= result.high
            shares = " | ".join(f"{100 * share / tries:.0f}%" for share in held)
            print(f"| {images} | {seeds} | {by_seed} | {by_image} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
