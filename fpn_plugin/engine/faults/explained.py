"""What stops a run from outside (a full disk, a killed worker, no memory), told so that one can act
on it."""

from __future__ import annotations

import contextlib
import re
from typing import Callable, Iterator, Sequence

from fpn_plugin.engine.faults.memory import OutOfMemoryError, is_out_of_memory, memory_error
from fpn_plugin.engine.faults.saving import SaveError, disk_error

# torch has no class for it: from its SIGCHLD handler, and from its loader when it misses an answer
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) .*")


class WorkerError(RuntimeError):
    """A process that loads data died."""


@contextlib.contextmanager
def explained(
    doing: str,
    folder: str,
    hints: Callable[[], Sequence[str]],
    workers_key: str = "DATALOADER.NUM_WORKERS",
) -> Iterator[None]:
    """Say of what runs inside, when something outside of it ends it, what to do about that.

    Args:
        doing: what runs, for messages.
        folder: the run's.
        hints: gives what may help when memory runs out.
        workers_key: the config key of the number of workers.

    Raises:
        SaveError: for an error of writing for which there was no room.
        WorkerError: if a process that loads data died.
        OutOfMemoryError: if memory ran out.
    """
    try:
        yield
    except (SaveError, WorkerError, OutOfMemoryError):  # of an evaluation in training
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        told = _told(error, doing, folder, hints, workers_key)
        if told is None:
            raise
        raise told from error


def _told(
    error: Exception,
    doing: str,
    folder: str,
    hints: Callable[[], Sequence[str]],
    workers_key: str,
) -> Exception | None:
    """What to raise instead of an error; None: it is about something else."""
    if isinstance(error, OSError):
        return disk_error(error, folder)
    if dead := _DEAD_WORKER.search(str(error)):
        return WorkerError(
            f"{dead[0].rstrip('. ')}. A worker that was killed often means that the system ran out"
            f" of memory (the system's log tells): try a lower {workers_key} or DATALOADER."
            f"PREFETCH_FACTOR. What was saved in {folder} is as it was:"
            " --resume goes on from there"
        )
    return memory_error(error, doing, hints()) if is_out_of_memory(error) else None
