"""Contestants in turns within one process: A B, B A, A B, … until the ratios can be told."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field
from typing import Callable, Mapping, Sequence

import numpy as np

from fpn_plugin.analysis.benchmark.clock import WHOLE, Clock, Work, no_lap, sample
from fpn_plugin.analysis.benchmark.statistics import OK, TOO_WIDE, Ratio, ratio_of, spread

MAX_REPEATS = 10_000


@dataclass(frozen=True)
class Plan:
    """How a race is run.

    Attributes:
        rounds: at least so many.
        max_rounds: more are taken while a ratio is too wide, up to here.
        min_sample: seconds that one sample shall last, at least: short work is repeated.
        warm_up: calls of each contestant before anything counts.
        max_spread: see :func:`ratio_of`.
        seed: of the bootstrap.
    """

    rounds: int = 10
    max_rounds: int = 40
    min_sample: float = 0.1
    warm_up: int = 2
    max_spread: float = 0.25
    seed: int = 0


@dataclass
class Times:
    """What was measured of one contestant.

    Attributes:
        repeats: calls per sample.
        samples: seconds of one call, one per round, by phase; WHOLE is all of it.
    """

    repeats: int
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, phase: str = WHOLE) -> float:
        """Seconds of one call."""
        return float(np.median(self.samples[phase]))

    def spread(self, phase: str = WHOLE) -> float:
        """Interquartile range over median."""
        return spread(self.samples[phase])


@dataclass(frozen=True)
class Race:
    """The result: times by contestant, and the ratio of each pair by phase."""

    times: Mapping[str, Times]
    ratios: Mapping[tuple[str, str], Mapping[str, Ratio]]

    def verdict(self, name: str, max_spread: float) -> str:
        """Of a contestant's own times: "ok" or "too wide"."""
        return OK if self.times[name].spread() <= max_spread else TOO_WIDE


def race(
    contestants: Mapping[str, Work],
    pairs: Sequence[tuple[str, str]],
    clock: Clock,
    plan: Plan = Plan(),
    on_round: Callable[[int], None] | None = None,
) -> Race:
    """Time all contestants in turns.

    The order is reversed every second round, so that no one always runs after the same other.

    Args:
        pairs: (contestant, reference): whose ratios are wanted.
        on_round: told the number of each round that is done.
    """
    times = {name: _warm_up(work, clock, plan) for name, work in contestants.items()}
    gc.collect()
    gc.freeze()  # what is there already is not looked through again after every round
    gc.disable()
    try:
        for done in range(1, plan.max_rounds + 1):
            for name in list(contestants)[:: 1 if done % 2 else -1]:
                seconds = sample(clock, contestants[name], times[name].repeats)
                for phase, value in seconds.items():
                    times[name].samples.setdefault(phase, []).append(value)
            gc.collect()
            if on_round:
                on_round(done)
            if done >= plan.rounds and _told(times, pairs, plan):
                break
    finally:
        gc.enable()
        gc.unfreeze()
    return Race(times, {pair: _ratios(times, pair, plan) for pair in pairs})


def _warm_up(work: Work, clock: Clock, plan: Plan) -> Times:
    for _ in range(plan.warm_up):
        work(no_lap)
    once = sample(clock, work, 1)[WHOLE]
    repeats = math.ceil(plan.min_sample / max(once, 1e-9))
    return Times(min(max(repeats, 1), MAX_REPEATS))


def _told(times: Mapping[str, Times], pairs: Sequence[tuple[str, str]], plan: Plan) -> bool:
    """Whether nothing is too wide: the ratios, and the times of those that are in none."""
    paired = {name for pair in pairs for name in pair}
    alone = [name for name in times if name not in paired]
    if any(times[name].spread() > plan.max_spread for name in alone):
        return False
    return all(_ratio(times, pair, WHOLE, plan).verdict == OK for pair in pairs)


def _ratios(times: Mapping[str, Times], pair: tuple[str, str], plan: Plan) -> dict[str, Ratio]:
    shared = [phase for phase in times[pair[0]].samples if phase in times[pair[1]].samples]
    return {phase: _ratio(times, pair, phase, plan) for phase in shared}


def _ratio(times: Mapping[str, Times], pair: tuple[str, str], phase: str, plan: Plan) -> Ratio:
    contestant, reference = pair
    return ratio_of(
        times[reference].samples[phase],
        times[contestant].samples[phase],
        plan.max_spread,
        plan.seed,
    )
