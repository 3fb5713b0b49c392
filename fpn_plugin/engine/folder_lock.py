"""One run per folder: a lock that the system holds for a process and drops when it dies."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lock"
# what file systems say that cannot lock, some network ones among them
_CANNOT = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: dict[str, int] = {}  # the descriptors of this process's locks, by the folders' real paths


class FolderInUseError(FileExistsError):
    """Another run is at work in a folder."""


def hold(folder: str, key: str) -> None:
    """Have a folder to oneself as long as this process lives, however it ends.

    The lock is `flock`'s on a file `.lock` in the folder, which names the process and stays when
    the lock is gone. A second call in the same process does nothing. Forked children (the workers
    of a data loader) give their share of the lock away, so that none which outlives a killed run
    keeps it. Where the file system cannot lock, a warning is all that happens.

    Args:
        folder: is made if it is missing.
        key: what names the folder in messages: OUTPUT_DIR, for instance.

    Raises:
        FolderInUseError: if another process has it; it names the process.
    """
    path = Path(folder).resolve() / LOCK
    if str(path) in _held:
        return
    if fcntl is None:
        logger.warning("%s %r is not locked: this system has no flock", key, folder)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by what is executed
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 4096, 0)
        os.close(handle)
        if error.errno in _CANNOT:
            logger.warning("%s %r: its file system has no locks (%s)", key, folder, error)
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise FolderInUseError(
            f"{key} {folder!r} is in use: {_describe(owner)}. Wait for its end, stop it, or choose"
            f" another {key}"
        ) from None
    _held[str(path)] = handle
    with contextlib.suppress(OSError):  # no room for the description: it is locked all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, _own_description(), 0)


def release(folder: str) -> None:
    """Give the folder back before the process ends; nothing if it is not held."""
    handle = _held.pop(str(Path(folder).resolve() / LOCK), None)
    if handle is not None:
        os.close(handle)


class Shared:
    """This process's locks, for processes that it spawns: pass it as one of their arguments.

    They hold them too, so a folder stays locked until the last of them is gone.
    """

    def __reduce__(self) -> Any:
        return _adopt, ({path: DupFd(handle) for path, handle in _held.items()},)


def _adopt(handles: dict[str, Any]) -> Shared:
    for path, handle in handles.items():
        _held[path] = handle.detach()
        os.set_inheritable(_held[path], False)
    return Shared()


def _own_description() -> bytes:
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode()


def _describe(content: bytes) -> str:
    """The owner by what it wrote; it may be about to write."""
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} runs there since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process runs there"


def _forget_in_child() -> None:
    """Close a forked child's copies: the parent's lock stays, as it is not unlocked."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
