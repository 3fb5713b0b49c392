"""Progress of a tool and of a run seen from outside, failures, the table of results."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fpn_plugin.report.progress import (
    Bar,
    RunsProgress,
    TrainingProgress,
    ap_table,
    follow,
    show_training,
)

STEP = {"iteration": 19, "total_loss": 1.43345, "eta_seconds": 64.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_there_are_lines() -> None:
    stream = io.StringIO()
    progress = TrainingProgress(stream=stream, interval=0)
    progress.begin("trees", 40)
    progress.update(STEP)
    progress.update({"iteration": 29, "total_loss": 1.0})  # Detectron2 has no ETA yet
    progress.update({**STEP, "iteration": 39})
    progress.end()
    progress.say("done")
    assert stream.getvalue().splitlines() == [
        "trees: iteration 20 of 40, loss 1.433, ETA 0:01:04",
        "trees: iteration 30 of 40, loss 1",
        "trees: iteration 40 of 40, loss 1.433, evaluating",
        "done",
    ]


def test_off_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, times = io.StringIO(), iter([0.0, 0.0, 10.0, 29.0, 31.0, 31.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    progress = TrainingProgress(stream=stream, interval=30)
    progress.begin("trees", 40)
    for iteration in (1, 2, 3, 4):
        progress.update({**STEP, "iteration": iteration})
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["2", "5"]


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    progress = TrainingProgress(stream=stream)
    progress.begin("run 1 of 2, fpn", 40)
    progress.update(STEP, ", of the study 1:01:04")
    assert stream.getvalue().rpartition("\r")[2] == (
        "run 1 of 2, fpn:  50%|##########          | 20/40,"
        " loss 1.433, ETA 0:01:04, of the study 1:01:04"
    )
    progress.end()
    progress.say("done")
    assert stream.getvalue().endswith("\rdone\n")


def test_quiet_is_quiet() -> None:
    stream = Terminal()
    progress = TrainingProgress(quiet=True, stream=stream)
    progress.begin("trees", 40)
    progress.update(STEP)
    progress.say("done")
    progress.end()
    assert stream.getvalue() == ""


def test_several_runs_share_the_lines_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = RunsProgress(stream=stream)
    progress.begin_all(3)
    for name in ("a", "b"):
        progress.begin(name, 40)
    for now[0] in range(0, 320, 10):
        for name in ("a", "b"):
            progress.update(name, STEP, ", of the study 0:10:00")
        progress.update_all(1, "2 at work")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a: iteration 20 of 40, loss 1.433, ETA 0:01:04, of the study 0:10:00"
    assert [line[0] for line in lines] == [*"ababababab", "a", "b", "1"]
    assert lines[-1] == "1 of 3 runs are done, 2 at work"
    progress.end("a")
    now[0] += 30
    progress.update("b", STEP)
    progress.end_all()
    assert len(stream.getvalue().splitlines()) == len(lines) + 1


def test_several_runs_have_a_bar_each_on_a_terminal() -> None:
    stream = Terminal()
    progress = RunsProgress(stream=stream)
    progress.begin_all(20)
    names = [f"run {number}" for number in range(20)]
    for name in names:  # more than there are bars
        progress.begin(name, 40)
    progress.update("run 3", STEP, ", of the study 0:10:00")
    progress.update_all(5, "15 at work, ETA 0:10:00")
    progress.say("a line")
    for name in names:
        progress.end(name)
    progress.begin("another", 40)
    progress.end_all()
    text = stream.getvalue()
    assert "run 3:  50%|##########          | 20/40, loss 1.433, ETA 0:01:04" in text
    assert "of the study" not in text and "run 15" not in text
    assert "all runs:  25%|#####               | 5/20, 15 at work, ETA 0:10:00" in text
    assert "a line\n" in text and "another:   0%" in text


def follow_code(code: str, folder: Path) -> tuple[list[Any], list[str]]:
    """The lines of metrics.json and of the output that a program's run gave."""
    metrics: list[Any] = []
    lines: list[str] = []
    with open(folder / "log.txt", "wb") as log:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        output = folder / "log.txt"
        follow(process, output, folder / "metrics.json", metrics.append, lines.append)
    return metrics, lines


@pytest.mark.parametrize("mode", ["a", "w"])
def test_follow_gives_new_metrics_and_output(tmp_path: Path, mode: str) -> None:
    """Both of a run that goes on and of one that replaces an old one."""
    old = "".join(f'{{"iteration": {i}, "total_loss": 9.0}}\n' for i in range(20))
    (tmp_path / "metrics.json").write_text(old + '{"half')
    new = json.dumps(STEP) + "\n" + '{"iteration": 19, "bbox/AP": 3.0}\n{"iteration"'
    metrics, lines = follow_code(
        f"import time; print('beware', flush=True); time.sleep(1.2);"
        f"open('metrics.json', {mode!r}).write({new!r})",
        tmp_path,
    )
    assert metrics == [STEP]
    assert lines == ["beware"]


def test_a_training_is_shown_with_its_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.json"
    code = f"open({str(metrics)!r}, 'w').write({json.dumps(STEP)!r} + chr(10)); print('chatter');"
    warning = "print('[1 d2]: WARNING beware');"
    show_training([sys.executable, "-c", code + warning], "trees", 40, metrics)
    step = "trees: iteration 20 of 40, loss 1.433, ETA 0:01:04"
    assert sorted(capsys.readouterr().out.splitlines()) == ["[1 d2]: WARNING beware", step]
    with pytest.raises(RuntimeError, match="exit code 3(.|\n)*last words"):
        code = "print('last words'); raise SystemExit(3)"
        show_training([sys.executable, "-c", code], "trees", 40, metrics)


def test_ap_table() -> None:
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    boxes = dict(zip(keys, (14.24, 45.4, 1, 2, 3, float("nan"))))
    masks = {"": boxes, "a nucleus": {**boxes, "AP": 7.0}}
    lines = ap_table({"bbox": {"": boxes}, "segm": masks}).splitlines()[2:]
    assert [line.split()[:2] for line in lines[:2]] == [["boxes", "14.2"], ["masks", "14.2"]]
    assert lines[2].split() == ["masks", "a", "nucleus", "7.0", "45.4", "1.0", "2.0", "3.0", "nan"]


def stages(stream: io.StringIO, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a `Bar` shows of a line and a stage of four steps, six seconds apart."""
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    bar = Bar(quiet, stream)
    bar.say("a line")
    bar.begin("Images", 4)
    for done in range(1, 5):
        bar.step(done)
    bar.end()
    return stream.getvalue()


def test_a_tools_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar on a terminal, lines elsewhere, nothing if asked."""
    lines = stages(io.StringIO(), False, monkeypatch).splitlines()
    assert lines[:2] == ["a line", "Images …"] and 2 < len(lines) <= 5
    assert all(" of 4, ETA 0:00:" in line for line in lines[2:])
    text = stages(Terminal(), False, monkeypatch)
    assert "Images" in text and "\r" in text and "ETA" not in text
    assert stages(Terminal(), True, monkeypatch) == ""
    assert stages(io.StringIO(), True, monkeypatch) == ""
