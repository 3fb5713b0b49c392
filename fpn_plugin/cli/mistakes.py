"""How a command ends: a mistake of the user in its message and exit code 2, an unexpected error in
its traceback and 1, an interruption in 130."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Iterator

from fpn_plugin.report.mistakes import PREFIX, mistake_of

MISTAKE, INTERRUPTED = 2, 130


@contextmanager
def mistakes(command: str, traceback: bool = False) -> Iterator[None]:
    """Run a command; a mistake ends the process, or what catches its SystemExit.

    Args:
        command: its name, for the message.
        traceback: whether a mistake keeps its traceback too.
    """
    try:
        yield
    except KeyboardInterrupt:
        if traceback:
            raise
        print("Interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        message = getattr(error, "mistake", None)  # of a process that was launched
        message = mistake_of(error) if message is None else message
        if traceback or not message:
            raise
        sys.stdout.flush()
        print(PREFIX.format(command) + message, file=sys.stderr)
        sys.exit(MISTAKE)
