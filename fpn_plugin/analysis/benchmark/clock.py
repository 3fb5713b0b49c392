"""Clocks: wall time on the CPU, events on a GPU. Seconds throughout."""

from __future__ import annotations

import time
from typing import Any, Callable, Protocol

import torch

Lap = Callable[[str], None]
Work = Callable[[Lap], Any]
"""What is timed. It is called with a function that ends a phase of it: `lap("forward")`."""

WHOLE = "whole"
"""The phase that is all of it."""


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


class FirstCall:
    """Work that remembers how long its first call took, with all that it compiled or cached.

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
        made = self._work(lap)
        self.seconds = time.perf_counter() - start
        return made


def clock_for(device: str) -> Clock:
    """The clock of a kind of device: "cuda", "cpu", …"""
    return EventClock() if device == "cuda" else WallClock()


def no_lap(name: str) -> None:
    """In place of a clock's, for work that is not timed."""


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
