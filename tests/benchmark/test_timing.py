"""Statistics and interleaved timing on clocks whose truth is known."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest

from fpn_plugin.benchmark.timing import (
    MAX_REPEATS,
    OK,
    TOO_WIDE,
    WHOLE,
    EventClock,
    FirstCall,
    Lap,
    Plan,
    WallClock,
    ratio_of,
    sample,
    spread,
    time_interleaved,
)


class FakeClock:
    """A clock that only work moves."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.random = np.random.default_rng(seed)
        self.order: list[str] = []

    def mark(self) -> float:
        return self.now

    def settle(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def work(
        self, name: str, seconds: float, noise: float = 0.0, phases: tuple[str, ...] = ()
    ) -> Callable[[Lap], None]:
        """Work of a known median; with noise it is lognormal."""

        def run(lap: Lap) -> None:
            self.order.append(name)
            for phase in phases or ("",):
                share = seconds / max(len(phases), 1)
                self.now += share * float(np.exp(noise * self.random.standard_normal()))
                if phase:
                    lap(phase)

        return run


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between rounds garbage is collected, which takes long beside all other tests' objects."""
    monkeypatch.setattr("gc.collect", lambda: None)


def test_spread_by_hand() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4 - 2) / 3)
    assert spread([2.0, 2.0]) == 0


def test_ratio_is_of_pairs() -> None:
    """What slows a whole round down does not count."""
    weather = [1.0, 5.0, 2.0, 9.0, 1.0]
    ratio = ratio_of([3 * w for w in weather], [2 * w for w in weather], 0.01)
    assert (ratio.value, ratio.low, ratio.high, ratio.verdict) == (1.5, 1.5, 1.5, OK)


def test_interval_covers_the_truth() -> None:
    """In 200 simulations the 95% interval holds the true ratio about as often as it says."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        reference = 3.0 * np.exp(0.1 * random.standard_normal(20))
        seconds = 2.0 * np.exp(0.1 * random.standard_normal(20))
        ratio = ratio_of(reference.tolist(), seconds.tolist(), 1.0, seed)
        covered += ratio.low <= 1.5 <= ratio.high
    assert 180 <= covered <= 200


def test_too_wide_is_refused() -> None:
    noisy = [1.0, 3.0, 1.0, 3.0, 1.0, 3.0]
    assert ratio_of(noisy, [1.0] * 6, 0.25).verdict == TOO_WIDE
    assert ratio_of(noisy, [1.0] * 6, 3.0).verdict == OK


def test_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="the same rounds of both: 2 and 1 given"):
        ratio_of([1.0, 2.0], [1.0], 0.1)


def test_same_seed_same_interval() -> None:
    random = np.random.default_rng(1)
    samples = random.uniform(1, 2, (2, 15)).tolist()
    assert ratio_of(*samples, 1.0, seed=3) == ratio_of(*samples, 1.0, seed=3)


def test_interleaved_and_the_order_is_reversed_each_round() -> None:
    clock = FakeClock()
    works = {name: clock.work(name, 1.0) for name in ("a", "b", "c")}
    time_interleaved(works, [], clock, Plan(3, 3, min_sample=0.1, warm_up=1))
    assert "".join(clock.order) == "aabbcc" + "abc" + "cba" + "abc"


def test_short_work_is_repeated() -> None:
    clock = FakeClock()
    works = {"short": clock.work("short", 0.01), "long": clock.work("long", 1.0)}
    works["nothing"] = clock.work("nothing", 0.0)
    done = time_interleaved(works, [], clock, Plan(2, 2, min_sample=0.095))
    repeats = {name: times.repeats for name, times in done.times.items()}
    assert repeats == {"short": 10, "long": 1, "nothing": MAX_REPEATS}
    assert done.times["short"].median() == pytest.approx(0.01)


def test_more_rounds_until_the_ratio_is_significant() -> None:
    clock = FakeClock()
    works = {"ours": clock.work("ours", 1.0, 0.2), "theirs": clock.work("theirs", 3.0, 0.2)}
    plan = Plan(5, 60, min_sample=0.0, max_spread=0.5)
    rounds_seen: list[int] = []
    done = time_interleaved(works, [("ours", "theirs")], clock, plan, rounds_seen.append)
    rounds = len(done.times["ours"].samples[WHOLE])
    ratio = done.ratios["ours", "theirs"][WHOLE]
    assert 5 <= rounds < 60 and rounds_seen == list(range(1, rounds + 1))
    assert ratio.verdict == OK and ratio.low <= 3.0 <= ratio.high


def test_it_gives_up() -> None:
    clock = FakeClock()
    works = {"ours": clock.work("ours", 1.0, 1.5), "theirs": clock.work("theirs", 1.0, 1.5)}
    done = time_interleaved(works, [("ours", "theirs")], clock, Plan(3, 7, 0.0, max_spread=0.05))
    assert len(done.times["ours"].samples[WHOLE]) == 7
    assert done.ratios["ours", "theirs"][WHOLE].verdict == TOO_WIDE


def test_phases_add_up() -> None:
    clock = FakeClock()
    phases = ("forward", "backward", "step")
    works = {"a": clock.work("a", 3.0, 0.3, phases), "b": clock.work("b", 6.0, 0.3, phases)}
    done = time_interleaved(works, [("a", "b")], clock, Plan(4, 4, 0.0, max_spread=10))
    samples = done.times["a"].samples
    assert set(samples) == {*phases, WHOLE}
    for i, whole in enumerate(samples[WHOLE]):
        assert whole == pytest.approx(sum(samples[phase][i] for phase in phases))
    assert set(done.ratios["a", "b"]) == {*phases, WHOLE}


class FakeEvent:
    """An event of a device that is always two milliseconds a mark ahead."""

    made = 0

    def __init__(self) -> None:
        self.at = -1.0

    def record(self) -> None:
        FakeEvent.made += 1
        self.at = 2.0 * FakeEvent.made

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_gpu_events() -> None:
    """Milliseconds of the device, and it is waited for before the first mark and after the last."""
    waits: list[int] = []
    clock = EventClock(FakeEvent, lambda: waits.append(FakeEvent.made))
    start = FakeEvent.made
    phases = sample(clock, lambda lap: lap("forward"), 3)
    assert waits == [start, start + 7]
    assert phases == pytest.approx({"forward": 0.002, WHOLE: 6 * 0.002 / 3})


def test_wall_clock() -> None:
    phases = sample(WallClock(), lambda lap: sum(range(1000)), 2)
    assert 0 < phases[WHOLE] < 1


def test_first_call() -> None:
    calls: list[Any] = []
    work = FirstCall(calls.append)
    assert work.seconds is None
    work(print)
    first = work.seconds
    work(print)
    assert work.seconds == first and len(calls) == 2
