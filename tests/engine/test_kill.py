"""A run that is killed at random moments, again and again, ends as an unbroken one, bit for bit."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from crash_child import OVERRIDES, Child, is_alive, waits
from test_resume import assert_same, final_state

from fpn_plugin.checkpoint.run_folder import metric_lines

PHASES = ("step", "saving", "evaluating")
KILLS = 6
# longer than a tiny run's steps and saves take, so that some kills hit what comes after
DELAYS = {"step": 0.2, "saving": 0.03, "evaluating": 0.3}
# what two runs of the same training may differ in: times, and medians over the last iterations
TIMES = ("time", "data_time", "eta_seconds", "rank_data_time")


def kill_once(chance: random.Random, phase: str, args: tuple[Any, ...], workers: set[int]) -> str:
    """Start a run, or go on with it, and kill it; what it did then, "" if it ended before."""
    child = Child(*args)
    if not child.wait_for(phase, chance.randint(1, 3 if phase == "step" else 1)):
        assert child.end() == 0, child.error
        return ""
    for passed in waits(chance.uniform(0, DELAYS[phase]), 0.001):
        child.hear(0)
    code = child.kill()
    workers |= child.workers
    assert code in (0, -signal.SIGKILL), child.error
    return child.phase if code else ""


def metrics(folder: Path) -> list[tuple[int, frozenset[str], Any]]:
    lines = metric_lines(str(folder))
    keys = [frozenset(line) - set(TIMES) for line in lines]
    return [(line["iteration"], names, line.get("bbox/AP")) for line, names in zip(lines, keys)]


def test_killed_again_and_again_at_random_moments(
    dataset: Path, unbroken: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown if this fails
    chance = random.Random(seed)
    workers: set[int] = set()
    hits: Counter[str] = Counter()
    runs = [tmp_path / "run-0"]
    while sum(hits.values()) < KILLS or not all(hits[phase] for phase in PHASES):
        assert len(runs) < 10, hits
        phase = min(PHASES, key=lambda phase: (hits[phase], chance.random()))
        hit = kill_once(chance, phase, (str(dataset), str(runs[-1]), OVERRIDES), workers)
        hits += Counter([hit] if hit else [])
        if not hit:
            runs.append(tmp_path / f"run-{len(runs)}")
    last = Child(str(dataset), str(runs[-1]), OVERRIDES)
    assert last.end() == 0, last.error
    print(dict(hits), f"in {len(runs)} runs")

    for run in runs:
        assert_same(final_state(run), final_state(unbroken), run.name)
        assert metrics(run) == metrics(unbroken)
        assert not list(run.glob("*.tmp"))
    assert any(not any(map(is_alive, workers)) for _ in waits()), "orphans"
