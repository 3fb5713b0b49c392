"""How far a tool is: a bar on a terminal, plain lines elsewhere, nothing if asked."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm


class Bar:
    """Progress of one thing after another.

    Args:
        quiet: say nothing.
        stream: where to; standard error by default, so that the report alone is on standard output.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None

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
        if self._stream.isatty():
            self._bar = tqdm(total=total, desc=name, file=self._stream, leave=False)
        else:
            print(f"{name} …", file=self._stream, flush=True)

    def step(self, done: int) -> None:
        """`done` steps of the stage are behind; more than it was thought to have are fine."""
        if self._bar is not None:
            self._bar.total = max(self._bar.total, done)
            self._bar.update(done - self._bar.n)

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
