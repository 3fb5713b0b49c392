"""A run that is killed at random moments, again and again, ends as an unbroken one, bit for bit."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from crash_child import Child, is_alive, waits
from test_resume import assert_same, final_state
from tiny import VAL

from fpn_plugin.engine.checkpoint import find_checkpoint, list_checkpoints
from fpn_plugin.engine.run_folder import metric_lines

PHASES = ("step", "saving", "evaluating")
KILLS = 10
OVERRIDES: dict[str, Any] = {
    "MODEL__RESNETS__DEPTH": 50,  # ResNet-18's widths are fixed
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 16,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "SOLVER__MAX_ITER": 8,
    "SOLVER__CHECKPOINT_PERIOD": 2,
    "SOLVER__AMP__ENABLED": True,
    "TEST__EVAL_PERIOD": 4,
    "DATASETS__TEST": (VAL,),
    "DATALOADER__NUM_WORKERS": 2,
}
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


def test_killed_ten_times_at_random_moments(dataset: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown if this fails
    chance = random.Random(seed)
    whole = Child(str(dataset), str(tmp_path / "whole"), OVERRIDES)
    assert whole.end() == 0, whole.error
    expected, workers = final_state(tmp_path / "whole"), set(whole.workers)

    hits: Counter[str] = Counter()
    runs = [tmp_path / "run-0"]
    while sum(hits.values()) < KILLS or not all(hits[phase] for phase in PHASES):
        assert len(runs) < KILLS, hits
        phase = min(PHASES, key=lambda phase: (hits[phase], chance.random()))
        hit = kill_once(chance, phase, (str(dataset), str(runs[-1]), OVERRIDES), workers)
        hits += Counter([hit] if hit else [])
        if not hit:
            runs.append(tmp_path / f"run-{len(runs)}")
    last = Child(str(dataset), str(runs[-1]), OVERRIDES)
    assert last.end() == 0, last.error
    print(dict(hits), f"in {len(runs)} runs")

    for run in runs:
        assert_same(final_state(run), expected, run.name)
        assert metrics(run) == metrics(tmp_path / "whole")
        assert not list(run.glob("*.tmp"))
    assert next((t for t in waits() if not any(map(is_alive, workers))), None) is not None, "orphans"
