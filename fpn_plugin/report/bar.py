"""Progress of a tool: tqdm's bar on a terminal, plain lines elsewhere, nothing if asked."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

_PAUSE = 10.0  # seconds between the lines of a stage, where there is no terminal


class Bar:
    """Progress of one stage after another.

    Args:
        quiet: print nothing.
        stream: standard error by default, so that standard output has the report alone.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._total = 0
        self._began = self._last_line = 0.0  # seconds

    def say(self, text: str) -> None:
        """A line of its own."""
        self.end()
        if not self._quiet:
            print(text, file=self._stream, flush=True)

    def begin(self, name: str, total: int) -> None:
        """A stage of `total` steps."""
        self.end()
        if self._quiet:
            return
        self._total, self._began = total, time.monotonic()
        self._last_line = self._began
        if self._stream.isatty():
            self._bar = tqdm(total=total, desc=name, file=self._stream, leave=False)
        else:
            print(f"{name} …", file=self._stream, flush=True)

    def step(self, done: int) -> None:
        """`done` steps of the stage are done, which may be more than its `total`."""
        if self._bar is not None:
            self._bar.total = max(self._bar.total, done)
            self._bar.update(done - self._bar.n)
        elif (
            not self._quiet and time.monotonic() - self._last_line >= _PAUSE and done < self._total
        ):
            now = self._last_line = time.monotonic()
            left = timedelta(seconds=round((now - self._began) * (self._total / done - 1)))
            print(f"  {done} of {self._total}, ETA {left}", file=self._stream, flush=True)

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
