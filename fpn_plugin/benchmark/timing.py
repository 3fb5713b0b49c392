"""Interleaved timing: A B, B A, A B, … within one process, until the ratios are significant.

Seconds throughout. `torch.utils.benchmark.Timer` measures one statement after another: it warms up
before every sample (three iterations for each one timed), has no pairs to take a machine's drift
out of a ratio, and knows no phases; synchronizing between them would stall a GPU. So the loop and
the clocks are here.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np
import torch

Lap = Callable[[str], None]
Work = Callable[[Lap], Any]
"""What is timed. It is called with a function that ends a phase of it: `lap("forward")`."""

WHOLE = "whole"
"""The phase that is all of it."""

OK, TOO_WIDE = "ok", "too wide"
MAX_REPEATS = 10_000
_RESAMPLES = 2000
_INSTANT = 1e-12  # seconds: below any clock's resolution


class Clock(Protocol):
    """A source of marks in time."""

    def mark(self) -> Any:
        """A point in time, after the work that was given to the device so far."""

    def settle(self) -> None:
        """Wait until the device has done its work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; called after :meth:`settle`."""


class WallClock:
    """`time.perf_counter`: on the CPU a call has done its work when it returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def settle(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """CUDA events: a call returns before its work is done, so the device itself stamps the times.

    Args:
        event: makes an event with `record()` and `elapsed_time(other)` in milliseconds; torch's by
            default.
        synchronize: waits for the device; torch's by default.
    """

    def __init__(
        self,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._synchronize = synchronize or torch.cuda.synchronize

    def mark(self) -> Any:
        event = self._event()
        event.record()
        return event

    def settle(self) -> None:
        self._synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000


def clock_for(device: str) -> Clock:
    """The clock of a kind of device: "cuda", "cpu", …"""
    return EventClock() if device == "cuda" else WallClock()


class FirstCall:
    """Work that remembers how long its first call took, compilation and caching included.

    Args:
        work: the work. The class serves as a decorator.

    Attributes:
        seconds: of the first call; None before it.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.seconds: float | None = None

    def __call__(self, lap: Lap) -> Any:
        if self.seconds is not None:
            return self._work(lap)
        start = time.perf_counter()
        result = self._work(lap)
        self.seconds = time.perf_counter() - start
        return result


def no_lap(name: str) -> None:
    """The `lap` of work that is not timed."""


def sample(clock: Clock, work: Work, repeats: int) -> dict[str, float]:
    """Seconds of one call of `work`, the mean of `repeats` calls: by phase, and WHOLE."""
    marks: list[tuple[str, Any]] = []

    def lap(name: str) -> None:
        marks.append((name, clock.mark()))

    clock.settle()
    start = clock.mark()
    for _ in range(repeats):
        work(lap)
        lap(WHOLE)  # also ends what came after the last phase
    clock.settle()
    phases: dict[str, float] = {}
    previous = start
    for name, mark in marks:
        phases[name] = phases.get(name, 0.0) + clock.seconds(previous, mark) / repeats
        previous = mark
    phases[WHOLE] = clock.seconds(start, marks[-1][1]) / repeats
    return phases


@dataclass(frozen=True)
class Ratio:
    """How many times faster a model is than its reference.

    Attributes:
        value: the median over the rounds of reference / model; above 1 is faster.
        low: the lower end of the 95% bootstrap interval of that median.
        high: its upper end.
        spread: interquartile range of the rounds' ratios over their median.
        verdict: OK, or TOO_WIDE where the ratio is inconclusive.
    """

    value: float
    low: float
    high: float
    spread: float
    verdict: str

    @property
    def width(self) -> float:
        """The width of the interval, relative to the ratio."""
        return (self.high - self.low) / self.value


def spread(samples: Sequence[float]) -> float:
    """The interquartile range over the median."""
    low, median, high = (float(np.percentile(samples, share)) for share in (25, 50, 75))
    return (high - low) / max(median, _INSTANT)


def ratio_of(
    reference: Sequence[float], seconds: Sequence[float], max_spread: float, seed: int = 0
) -> Ratio:
    """The ratio of two interleaved timings, paired by round, with its bootstrap interval.

    What slows down a whole round slows down both, and pairing cancels it.

    Args:
        reference: the reference's seconds, one per round.
        seconds: the model's, of the same rounds.
        max_spread: the verdict is TOO_WIDE where the spread of the rounds' ratios, or the relative
            width of the interval, is above it.
        seed: of the resampling.

    Raises:
        ValueError: if the two have different numbers of rounds, or none.
    """
    if len(reference) != len(seconds) or len(reference) == 0:
        raise ValueError(
            f"a ratio needs the same rounds of both: {len(reference)} and {len(seconds)} given"
        )
    ratios = np.maximum(reference, _INSTANT) / np.maximum(seconds, _INSTANT)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5)).tolist()
    value, ratio_spread = float(np.median(ratios)), spread(ratios.tolist())
    too_wide = max((high - low) / value, ratio_spread) > max_spread
    return Ratio(value, low, high, ratio_spread, TOO_WIDE if too_wide else OK)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: at least so many.
        max_rounds: more are taken while a ratio is too wide, up to here.
        min_sample: seconds that one sample shall last, at least: short work is repeated.
        warm_up: calls of each model before anything counts.
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
    """The samples of one model.

    Attributes:
        repeats: calls per sample.
        samples: seconds of one call, one per round, by phase; WHOLE is all of it.
    """

    repeats: int
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(self.samples[WHOLE])

    def median(self, phase: str = WHOLE) -> float:
        """Seconds of one call."""
        return float(np.median(self.samples[phase]))

    def spread(self) -> float:
        """Interquartile range over median."""
        return spread(self.samples[WHOLE])


@dataclass(frozen=True)
class InterleavedTimes:
    """Times by model, and the ratio of each (model, reference) by phase."""

    times: Mapping[str, Times]
    ratios: Mapping[tuple[str, str], Mapping[str, Ratio]]


def time_interleaved(
    works: Mapping[str, Work],
    pairs: Sequence[tuple[str, str]],
    clock: Clock,
    plan: Plan = Plan(),
    on_round: Callable[[int], None] | None = None,
) -> InterleavedTimes:
    """Time all work in turns.

    The order is reversed every second round, so that nothing always runs after the same other.

    Args:
        works: what is timed, by the model's name.
        pairs: (model, reference): whose ratios are wanted.
        on_round: called with the number of each round that is done.
    """
    times = {name: _warm_up(work, clock, plan) for name, work in works.items()}
    gc.collect()
    gc.freeze()  # what exists already is not scanned again after every round
    gc.disable()
    try:
        for done in range(1, plan.max_rounds + 1):
            for name in list(works)[:: 1 if done % 2 else -1]:
                seconds = sample(clock, works[name], times[name].repeats)
                for phase, value in seconds.items():
                    times[name].samples.setdefault(phase, []).append(value)
            gc.collect()
            if on_round:
                on_round(done)
            if done >= plan.rounds and _conclusive(times, pairs, plan):
                break
    finally:
        gc.enable()
        gc.unfreeze()
    return InterleavedTimes(times, {pair: _ratios(times, pair, plan) for pair in pairs})


def _warm_up(work: Work, clock: Clock, plan: Plan) -> Times:
    for _ in range(plan.warm_up):
        work(no_lap)
    once = sample(clock, work, 1)[WHOLE]
    repeats = math.ceil(plan.min_sample / max(once, 1e-9))
    return Times(min(max(repeats, 1), MAX_REPEATS))


def _conclusive(times: Mapping[str, Times], pairs: Sequence[tuple[str, str]], plan: Plan) -> bool:
    """Whether nothing is too wide: no ratio, and no time of a model that is in none."""
    unpaired = set(times) - {name for pair in pairs for name in pair}
    if any(times[name].spread() > plan.max_spread for name in unpaired):
        return False
    return all(_ratio(times, pair, WHOLE, plan).verdict == OK for pair in pairs)


def _ratios(times: Mapping[str, Times], pair: tuple[str, str], plan: Plan) -> dict[str, Ratio]:
    shared = [phase for phase in times[pair[0]].samples if phase in times[pair[1]].samples]
    return {phase: _ratio(times, pair, phase, plan) for phase in shared}


def _ratio(times: Mapping[str, Times], pair: tuple[str, str], phase: str, plan: Plan) -> Ratio:
    model, reference = (times[name].samples[phase] for name in pair)
    return ratio_of(reference, model, plan.max_spread, plan.seed)
