"""SIGTERM and SIGUSR1 end a run with a checkpoint, and it goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from crash_child import OVERRIDES, Child
from test_resume import assert_same, final_state

from fpn_plugin.engine.interrupt import RESUME_ME


@pytest.mark.parametrize("phase, number", [("step", "SIGTERM"), ("evaluating", "SIGUSR1")])
def test_ends_with_a_checkpoint(
    phase: str, number: str, dataset: Path, unbroken: Path, tmp_path: Path
) -> None:
    arguments = (str(dataset), str(tmp_path / "run"), OVERRIDES)
    told = Child(*arguments)
    assert told.wait_for(phase, 2 if phase == "step" else 1), told.error
    for worker in told.workers:  # a scheduler tells them as well
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.Signals[number])
    assert told.kill(signal.Signals[number]) == RESUME_ME, told.error
    saved = list((tmp_path / "run").glob("model_*.pth"))
    assert saved and not (tmp_path / "run" / "model_final.pth").exists()

    resumed = Child(*arguments)
    assert resumed.end() == 0, resumed.error
    assert_same(final_state(tmp_path / "run"), final_state(unbroken), phase)
