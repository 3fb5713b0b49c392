"""Files that ship inside Python packages: fetched by pip, checked by hash, read without installing.

Nothing is unpacked to disk, so no member of an archive can end up outside a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)")


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Return the wheel of a pinned package, downloaded by pip unless ``folder`` has it already.

    Args:
        requirement: ``name==version``.
        sha256: the hash that the wheel must have, cached or downloaded.
        folder: where downloads are kept between runs; created if it does not exist.

    Raises:
        ValueError: the requirement is not of the form ``name==version``.
        RuntimeError: pip failed; the message ends with the last lines of its output.
    """
    pin = _PIN.fullmatch(requirement)
    if pin is None:
        raise ValueError(f"requirement {requirement!r} is not of the form 'name==version'")
    stem = re.sub(r"[-_.]+", "_", pin["name"]).lower()
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(folder.glob("*.whl")):
        if wheel.name.lower().startswith(f"{stem}-{pin['version']}-") and _hash(wheel) == sha256:
            return wheel
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        wheel = _download(requirement, sha256, Path(scratch))
        return wheel.replace(folder / wheel.name)


def _download(requirement: str, sha256: str, scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{requirement} is downloaded by pip, which {sys.executable} does not have: install it"
            " (`python -m ensurepip`, or `uv pip install pip`)"
        )
    # pip takes hashes from requirement files only.
    lock = scratch / "requirements.txt"
    lock.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    # nothing of it is run, so it may be for another Python
    options += ["--ignore-requires-python"]
    # What is kept is in the dataset's folder; pip's cache would be in the user's home.
    options += ["--no-cache-dir", "--disable-pip-version-check"]
    options += ["--dest", str(scratch), "-r", str(lock)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        output = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise RuntimeError(
            f"pip could not download {requirement} (exit status {result.returncode}). "
            f"It needs a network, or a package index that has this version. pip said:\n{output}"
        )
    return wheels[0]


def member_names(wheel: Path) -> list[str]:
    """Return the names of all members, in the wheel's order."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def read_members(wheel: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the content of the named members.

    Raises:
        KeyError: a member is not in the wheel; the message names it and those beside it.
    """
    with zipfile.ZipFile(wheel) as archive:
        present = set(archive.namelist())
        content = {}
        for name in names:
            if name not in present:
                folder = name.rpartition("/")[0] + "/"
                beside = sorted(n for n in present if n.startswith(folder))
                raise KeyError(f"{wheel.name} has no member {name!r}; in {folder!r}: {beside}")
            content[name] = archive.read(name)
    return content


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
