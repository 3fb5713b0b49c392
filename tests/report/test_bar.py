"""Progress: a bar on a terminal, lines elsewhere, nothing if asked."""

from __future__ import annotations

import io

import pytest

from fpn_plugin.report import bar
from fpn_plugin.report.bar import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(bar.time, "monotonic", lambda: float(next(now)))
    progress = Bar(quiet, stream)
    progress.say("a line")
    progress.begin("Images", 4)
    for done in range(1, 5):
        progress.step(done)
    progress.end()
    return stream.getvalue()


def test_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(io.StringIO(), False, monkeypatch).splitlines()
    assert lines[:2] == ["a line", "Images …"] and len(lines) <= 5
    assert all(" of 4, ETA 0:00:" in line for line in lines[2:]) and len(lines) > 2


def test_a_terminal_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(Terminal(), False, monkeypatch)
    assert "Images" in text and "\r" in text and "ETA" not in text
    assert run(Terminal(), True, monkeypatch) == run(io.StringIO(), True, monkeypatch) == ""
