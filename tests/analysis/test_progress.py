"""The demo's view of a run: progress lines, failures, and the table of results."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fpn_plugin.analysis.progress import follow, progress_text, summary

STEP = (
    "[11/22 15:02:15 d2.utils.events]:  eta: 0:01:04  iter: 19  total_loss: 1.433  loss_cls: 0.5578"
    "    time: 1.5929  last_time: 1.9509  data_time: 0.0078   lr: 0.00015225"
)
EVAL = (
    "[11/22 15:28:01 d2.evaluation.evaluator]: Inference done 11/12. Total: 0.2 s/iter. ETA=0:00:03"
)


def test_progress_lines() -> None:
    assert progress_text(STEP) == "iteration 20, loss 1.433, ETA 0:01:04"
    assert progress_text(EVAL) == "evaluated 11 of 12 images, ETA 0:00:03"
    assert progress_text("[11/22 15:02:15 d2.utils.env]: Using a generated seed") is None


def run(code: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_follow_shows_progress_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    follow(run(f"print({STEP!r}); print('chatter'); print('WARNING [x]: beware')"))
    shown = capsys.readouterr().out
    assert "iteration 20, loss 1.433" in shown
    assert "beware" in shown
    assert "chatter" not in shown
    assert "finished" in shown


def test_a_failed_run_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match="exit code 3(.|\n)*last words"):
        follow(run("print('last words'); raise SystemExit(3)"))


def test_summary() -> None:
    metrics = {"bbox/AP": 14.24, "bbox/AP50": 45.4, "bbox/APl": float("nan"), "segm/AP": 7.0}
    text = summary(metrics)
    assert text.splitlines()[2].split()[:3] == ["boxes", "14.2", "45.4"]
    assert "masks" in text and "nan" in text
    with pytest.raises(ValueError, match="no AP among the metrics loss"):
        summary({"loss": 1.0})
