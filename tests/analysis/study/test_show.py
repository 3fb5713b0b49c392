"""The progress of a study: on a terminal, elsewhere, quiet; and its estimates."""

from __future__ import annotations

import io

import pytest

from fpn_plugin.analysis.progress import Progress
from fpn_plugin.analysis.study.show import Display, Watcher

STEP = "[1 d2.utils.events]:  eta: 0:01:40  iter: 119  total_loss: 1.433  loss_cls: 0.5578\n"
LINE = "run 3 of 33, fpn-avg seed 0, iteration 120 of 400"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_there_is_a_line_now_and_then() -> None:
    stream, times = io.StringIO(), iter([0.0, 10.0, 29.0, 31.0, 45.0])
    display = Display(stream=stream, clock=lambda: next(times))
    for text in "abcde":
        display.update(text)
    display.say("done")
    assert stream.getvalue() == "a\nd\ndone\n"


def test_on_a_terminal_it_stays_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    display = Display(stream=stream)
    display.update("x" * 40)
    display.update("y")
    display.say("done")
    assert stream.getvalue() == f"\r\x1b[K{'x' * 19}\r\x1b[Ky\r\x1b[Kdone\n"


def test_quiet_is_quiet() -> None:
    stream = Terminal()
    display = Display(quiet=True, stream=stream)
    display.update("a")
    display.say("b")
    assert stream.getvalue() == ""


def test_the_line_tells_run_iteration_and_both_etas() -> None:
    stream, times = io.StringIO(), iter([0.0, 50.0])
    asked = []

    def rest(seconds: float) -> float:
        asked.append(seconds)
        return 3600.0

    watcher = Watcher(
        *(Display(stream=stream), "run 3 of 33, fpn-avg seed 0", 400, rest), lambda: next(times)
    )
    watcher.see("chatter")
    watcher.see(STEP)
    assert asked == [150.0]  # 50 so far and 100 to go
    assert stream.getvalue() == f"{LINE}, ETA of the run 0:01:40, of the study 1:01:40\n"


def test_the_line_tells_of_an_evaluation() -> None:
    watcher = Watcher(Display(), "run", 400, lambda seconds: 0.0)
    assert watcher.text(Progress(8, 12, "0:00:03")).startswith("run, evaluated 8 of 12 images, ETA")


@pytest.mark.parametrize(
    "eta, seconds", [("0:01:40", 100), ("1 day, 0:00:05", 86405), ("2 days, 1:00:00", 176400)]
)
def test_an_eta_in_seconds(eta: str, seconds: int) -> None:
    assert Progress(1, 0, eta).seconds_left == seconds
