"""What stops a run from outside (a full disk, a killed worker), told so that one can act on it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any, Iterator

import torch

# no room left: on the device, in the quota, under the limit of a file's size
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch has no class for it: from its SIGCHLD handler, and from its loader when it misses an answer
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) .*")


class SaveError(OSError):
    """A file of a run could not be written; `errno` and `filename` are the system's."""


class WorkerError(RuntimeError):
    """A process that loads data died."""


def save_error(path: Path, error: OSError, needed: int = 0) -> SaveError:
    """What to raise for a file that could not be written.

    Args:
        needed: its size in bytes, as far as that is known; 0: unknown.
    """
    size = f", it needs about {_megabytes(needed)}" if needed else ""
    free = _megabytes(shutil.disk_usage(path.parent).free)
    advice = "make room" if error.errno in _FULL else "see to that"
    text = (
        f"{error.strerror or error}: {path.name} was not written{size}; {free} are free. What was"
        f" saved before is as it was: {advice}, then go on from there with --resume"
    )
    return SaveError(error.errno or errno.EIO, text, str(path))


def tensor_bytes(state: Any) -> int:
    """The memory of all tensors in nested dicts, lists and tuples, each storage once."""
    storages: dict[int, int] = {}
    pending = [state]
    while pending:
        node = pending.pop()
        if isinstance(node, torch.Tensor):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, (list, tuple)):
            pending.extend(node)
    return sum(storages.values())


def first_cause(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The error of these kinds that an error was raised for, or while it was handled."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause


@contextlib.contextmanager
def explained(folder: str, workers_key: str = "DATALOADER.NUM_WORKERS") -> Iterator[None]:
    """Raise a full disk and a dead data worker as errors that say what to do about them.

    Args:
        folder: the run's, for what does not say which file it is.
        workers_key: the config key of the number of workers.

    Raises:
        SaveError: for an error of writing for which there was no room.
        WorkerError: if a process that loads data died.
    """
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise save_error(Path(error.filename or os.path.join(folder, "…")), error) from error
    except RuntimeError as error:
        dead = _DEAD_WORKER.search(str(error))
        if dead is None:
            raise
        raise WorkerError(
            f"{dead[0].rstrip('. ')}. A worker that was killed often means that the system ran out"
            f" of memory (the system's log tells): try a lower {workers_key}, DATALOADER."
            f"PREFETCH_FACTOR or DATALOADER.CACHE_IMAGES. What was saved in {folder} is as it was:"
            " --resume goes on from there"
        ) from error


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
