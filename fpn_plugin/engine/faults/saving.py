"""Files that cannot be written, for want of room above all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

# no room left: on the device, in the quota, under the limit of a file's size
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveError(OSError):
    """A file of a run could not be written; `errno` and `filename` are the system's."""


def save_error(path: Path, error: OSError, needed: int = 0) -> SaveError:
    """What to raise for a file that could not be written.

    Args:
        needed: its size in bytes, as far as that is known; 0: unknown.
    """
    size = f", it needs about {_megabytes(needed)}" if needed else ""
    folder = next((place for place in path.parents if place.is_dir()), Path("."))
    free = _megabytes(shutil.disk_usage(folder).free)
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


def disk_error(error: OSError, folder: str) -> SaveError | None:
    """What to raise for an error of writing somewhere else in a run.

    Args:
        folder: the run's, for what does not say which file it is.

    Returns:
        None if it is about something else than room.
    """
    if error.errno not in _FULL:
        return None
    return save_error(Path(error.filename or os.path.join(folder, "…")), error)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
