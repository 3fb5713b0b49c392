"""Writing prepared datasets so that a half-written one is never seen."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAMP = "prepared.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON whose bytes depend on the content only; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes ``target`` only if the block ends without an error."""
    with _scratch_folder(target) as scratch:
        path = scratch / target.name
        yield path
        os.replace(path, target)


def prepare_folder(
    target: Path, parameters: Mapping[str, Any], build: Callable[[Path], None]
) -> bool:
    """Build a dataset folder unless it is there, complete and made with the same parameters.

    The folder is built beside ``target`` and renamed into place, with a stamp that lists its files
    and their sizes. A folder that this function did not make, or that somebody added files to, is
    left alone.

    Args:
        target: the folder to build.
        parameters: everything that its content depends on; must survive a round trip via JSON.
        build: writes the content into the empty folder that it is given.

    Returns:
        Whether the folder had to be built.

    Raises:
        ValueError: ``target`` holds files that are not ours to replace.
    """
    stamp = _read_stamp(target)
    if stamp and stamp["parameters"] == dict(parameters) and _is_complete(target, stamp["files"]):
        return False
    _refuse_foreign_files(target, stamp)
    with _scratch_folder(target) as scratch:
        fresh = scratch / "new"
        fresh.mkdir()
        build(fresh)
        files = {name: (fresh / name).stat().st_size for name in _list_files(fresh)}
        write_json(fresh / STAMP, {"parameters": dict(parameters), "files": files})
        if target.exists():
            # Moved, not deleted, so that the moment without a dataset is as short as a rename.
            target.rename(scratch / "old")
        fresh.rename(target)
    return True


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder on the same file system as ``target``; it is removed afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _list_files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def _read_stamp(target: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads((target / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and {"parameters", "files"} <= set(stamp) else None


def _is_complete(target: Path, files: Mapping[str, int]) -> bool:
    return all(
        (target / name).is_file() and (target / name).stat().st_size == size
        for name, size in files.items()
    )


def _refuse_foreign_files(target: Path, stamp: Mapping[str, Any] | None) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, but the dataset's folder has to go there: move it")
    known = {STAMP, *stamp["files"]} if stamp else set()
    foreign = [name for name in _list_files(target) if name not in known]
    if foreign:
        raise ValueError(
            f"{target} would have to be replaced, but it holds {len(foreign)} file(s) that were "
            f"not made by this script, such as {foreign[0]!r}: move them or set DETECTRON2_DATASETS"
        )
