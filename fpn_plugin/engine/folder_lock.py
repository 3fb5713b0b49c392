"""One run per folder: a lock that the system releases when the process dies."""

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
# errors of file systems without locks, such as some network file systems
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: dict[str, int] = {}  # the descriptors of this process's locks, by the folders' real paths


class FolderInUseError(FileExistsError):
    """Another run is using a folder."""


def hold(folder: str, key: str) -> None:
    """Lock a folder for this process until it ends, in whatever way.

    The lock is `flock`'s on the file `.lock` in the folder. The file names the process, and stays
    when the lock is gone. A second call in the same process does nothing. Forked children (the
    workers of a data loader) give up their share of the lock, so that no worker that outlives a
    killed run keeps it. If the file system cannot lock, there is only a warning.

    Args:
        folder: is created if it is missing.
        key: the config key of the folder, for messages: OUTPUT_DIR, for instance.

    Raises:
        FolderInUseError: naming the process that holds the lock.
    """
    path = Path(folder).resolve() / LOCK
    if str(path) in _held:
        return
    if fcntl is None:
        logger.warning("%s %r is not locked: this system has no flock", key, folder)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited on exec
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 4096, 0)
        os.close(handle)
        if error.errno in _UNSUPPORTED:
            logger.warning("%s %r: its file system has no locks (%s)", key, folder, error)
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise FolderInUseError(
            f"{key} {folder!r} is in use: {_describe(owner)}. Wait for its end, stop it, or choose"
            f" another {key}"
        ) from None
    _held[str(path)] = handle
    with contextlib.suppress(OSError):  # without room for the description it is locked as well
        os.ftruncate(handle, 0)
        os.pwrite(handle, _own_description(), 0)


def release(folder: str) -> None:
    """Unlock a folder before the process ends; does nothing if it is not locked."""
    handle = _held.pop(str(Path(folder).resolve() / LOCK), None)
    if handle is not None:
        os.close(handle)


class SharedLocks:
    """This process's locks, to be passed to spawned processes as one of their arguments.

    A folder then stays locked until the last of the processes has ended.
    """

    def __reduce__(self) -> Any:
        return _adopt, ({path: DupFd(handle) for path, handle in _held.items()},)


def _adopt(handles: dict[str, Any]) -> SharedLocks:
    for path, handle in handles.items():
        _held[path] = handle.detach()
        os.set_inheritable(_held[path], False)
    return SharedLocks()


def _own_description() -> bytes:
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode()


def _describe(content: bytes) -> str:
    """The owner as the file describes it; it may not have written it yet."""
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} runs there since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process runs there"


def _forget_in_child() -> None:
    """Close a forked child's descriptors, which leaves the parent's locks in place."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
