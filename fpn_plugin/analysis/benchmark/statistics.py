"""Medians, their spread, and an interval for the ratio of two times measured in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

OK, TOO_WIDE = "ok", "too wide"
_RESAMPLES = 2000
_INSTANT = 1e-12  # seconds: less than any clock can tell


@dataclass(frozen=True)
class Ratio:
    """How many times faster a contestant is than a reference.

    Attributes:
        value: the median over the rounds of reference / contestant; above 1 is faster.
        low: the lower end of the 95% bootstrap interval of that median.
        high: its upper end.
        spread: interquartile range of the rounds' ratios over their median.
        verdict: "ok", or "too wide" where the numbers allow no statement.
    """

    value: float
    low: float
    high: float
    spread: float
    verdict: str

    @property
    def width(self) -> float:
        """Of the interval, relative to the ratio."""
        return (self.high - self.low) / self.value


def spread(samples: Sequence[float]) -> float:
    """The interquartile range over the median."""
    quartiles = [float(np.percentile(samples, share)) for share in (25, 50, 75)]
    return (quartiles[2] - quartiles[0]) / max(quartiles[1], _INSTANT)


def ratio_of(
    reference: Sequence[float],
    contestant: Sequence[float],
    max_spread: float,
    seed: int = 0,
) -> Ratio:
    """The ratio of two contestants' times, paired by round, with its bootstrap interval.

    What slows a whole round down, slows both: pairing takes that out.

    Args:
        reference: seconds, one per round.
        contestant: of the same rounds.
        max_spread: the verdict is "too wide" where the spread of the rounds' ratios, or the
            relative width of the interval, is above it.
        seed: of the resampling.

    Raises:
        ValueError: if the two have other numbers of rounds, or none.
    """
    if len(reference) != len(contestant) or len(reference) == 0:
        raise ValueError(
            f"a ratio needs the same rounds of both: {len(reference)} and {len(contestant)} given"
        )
    ratios = np.maximum(reference, _INSTANT) / np.maximum(contestant, _INSTANT)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    value = float(np.median(ratios))
    made = Ratio(value, float(low), float(high), spread(ratios.tolist()), OK)
    if max(made.width, made.spread) > max_spread:
        return Ratio(made.value, made.low, made.high, made.spread, TOO_WIDE)
    return made
