"""Finds the files below an image folder that a JSON names in another way: as Windows writes paths,
percent-encoded, in another case, with the path on another machine."""

from __future__ import annotations

import difflib
import functools
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

from .image_checks import name_fault

__all__ = ["ImageFolder"]

_MOST_FILES = 1_000_000  # listed below a folder; in a larger one only exact names are found
_MOST_COMPARED = 20_000
_STRANGE = re.compile(r"\.\.|[\\:\0]|^/")  # what no plain name below a folder has

Parts = tuple[str, ...]


class ImageFolder:
    """A folder of images. Folders are listed instead of asking for each file, and everything below
    is listed only if a name is missing.

    Args:
        path: of the folder; every name is relative to it.
        outside: whether names may lead out of it.
    """

    def __init__(self, path: str, outside: bool = False) -> None:
        self.path = os.path.abspath(path)
        self.outside = outside
        self._content: dict[str, frozenset[str]] = {}

    def find(self, names: Iterable[str]) -> dict[str, str]:
        """The files that names stand for which are not themselves the path of a file below.

        A file is found if either path, without regard to case, separators, percent-encoding and
        Unicode's forms, is the end of the other: `C:\\\\data\\\\images\\\\A%201.JPG` is `a 1.jpg`,
        and `a.jpg` is `day1/a.jpg`. The longest common end counts. If several files are left, or
        other names stand for the same file, it is not found.

        Returns:
            a path relative to the folder by name, for those found.
        """
        names = dict.fromkeys(names)
        missing = [name for name in names if not self._has(name)]
        if not missing:
            return {}
        found = {name: match for name in missing if (match := self._match(name))}
        taken = Counter(found.values())
        taken.update(posixpath.normpath(name) for name in names.keys() - set(missing))
        return {name: match for name, match in found.items() if taken[match] == 1}

    def hint(self, name: str) -> str:
        """What may be meant by the name of a file that is not there; "" if nothing is like it."""
        files = [parts[-1] for candidates in self._files.values() for _, parts in candidates]
        last = self._parts(name)[-1:] or (name,)
        same = ["/".join(parts) for _, parts in self._files.get(_key(last)[0], ())]
        close = same or difflib.get_close_matches(last[0], files[:_MOST_COMPARED], 3)
        return f"; there is {', '.join(map(repr, close[:3]))}" if close else ""

    def _has(self, name: str) -> bool:
        """Whether a name is the path of a file that it may lead to."""
        if _STRANGE.search(name) and name_fault(name, self.outside):
            return False
        folder, file = os.path.split(name)
        if folder not in self._content:
            self._content[folder] = _listed(os.path.join(self.path, folder))
        return file in self._content[folder]

    def _match(self, name: str) -> str:
        """The only file that a name can stand for, or ""."""
        parts = self._parts(name)
        if not parts:
            return ""
        key = _key(parts)
        best: tuple[int, int] = (0, 0)
        matches: list[Parts] = []
        for other_key, other in self._files.get(key[-1], ()):
            count = min(len(key), len(other_key))
            if key[-count:] != other_key[-count:]:
                continue
            score = (count, sum(map(str.__eq__, parts[-count:], other[-count:])))
            if score > best:
                best, matches = score, []
            if score == best:
                matches.append(other)
        return "/".join(matches[0]) if len(matches) == 1 else ""

    def _parts(self, name: str) -> Parts:
        """The parts of a path, without a drive or address; none if `..` leads out of the folder."""
        path = re.sub(r"^(\w+://|\w:)", "/", name.replace("\\", "/").replace("?d=", "/"))
        if ".." in path.split("/"):
            path = os.path.relpath(os.path.join(self.path, path.lstrip("/")), self.path)
        parts = tuple(part for part in path.split("/") if part not in ("", "."))
        return () if ".." in parts else parts

    @functools.cached_property
    def _files(self) -> dict[str, list[tuple[Parts, Parts]]]:
        """All files below by the keys of their names: the keys of the path's parts, and these."""
        files = defaultdict(list)
        for number, parts in enumerate(_walk(self.path)):
            if number == _MOST_FILES:
                return {}
            key = _key(parts)
            files[key[-1]].append((key, parts))
        return files


def _listed(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):
        return frozenset()


def _walk(folder: str) -> Iterator[Parts]:
    """The paths of all files below a folder, through links too, but no folder twice."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        below = os.path.relpath(path, folder)
        parents = () if below == "." else tuple(below.split(os.sep))
        for file in sorted(files):
            yield (*parents, file)


def _key(parts: Parts) -> Parts:
    """Parts of a path such that those are equal which are meant to be."""
    return tuple(
        unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(part)).casefold()).strip()
        for part in parts
    )
