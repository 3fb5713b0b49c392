"""How far a study is: one line that stays on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import datetime
import shutil
import sys
import time
from typing import Callable, TextIO

from fpn_plugin.analysis.progress import Progress, read_progress

_EVERY = 30.0  # seconds between the lines where there is no terminal


class Display:
    """The progress line of a study.

    Args:
        quiet: show nothing.
        stream: where to; standard error by default.
        clock: seconds.
    """

    def __init__(
        self,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._shown = -_EVERY
        self._open = False

    def say(self, text: str) -> None:
        """A line that stays."""
        self.end()
        if not self._quiet:
            print(text, file=self._stream, flush=True)

    def update(self, text: str) -> None:
        """The line in the place of the last one; off a terminal, if the last one is old."""
        now = self._clock()
        if self._quiet or (not self._terminal and now - self._shown < _EVERY):
            return
        self._shown = now
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self._stream, flush=True)
            self._open = True
        else:
            print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Leave the line that was updated."""
        if self._open:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._open = False


class Watcher:
    """Reads the log of one run and updates the display.

    Args:
        title: of the run, with its place in the study.
        iterations: of its training.
        rest: gives the seconds of the runs after it from this one's.
    """

    def __init__(
        self,
        display: Display,
        title: str,
        iterations: int,
        rest: Callable[[float], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._display, self._title, self._iterations = display, title, iterations
        self._rest, self._clock, self._start = rest, clock, clock()

    def see(self, line: str) -> None:
        """A line of the log."""
        progress = read_progress(line)
        if progress is not None:
            self._display.update(self.text(progress))

    def text(self, progress: Progress) -> str:
        """The line that is shown."""
        left = progress.seconds_left
        whole = self._clock() - self._start + left
        if progress.total:
            state = f"evaluated {progress.done} of {progress.total} images"
        else:
            state = f"iteration {progress.done} of {self._iterations}"
        return (
            f"{self._title}, {state}, ETA of the run {span(left)}, "
            f"of the study {span(left + self._rest(whole))}"
        )


def span(seconds: float) -> str:
    """A time as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))
