"""A study file: which configs are trained with which seeds, and what is then compared."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

import yaml

from fpn_plugin.engine.size_bins import check_edges
from fpn_plugin.registry import unknown_name

REPORT = "report"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_RUN_KEYS = ("config", "overrides")


@dataclass(frozen=True)
class Entry:
    """A config of the study.

    Attributes:
        name: of its folder.
        config: the YAML file.
        overrides: `KEY VALUE …` as a command line has them, those of all runs first.
    """

    name: str
    config: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        output: the folder of all runs and of the report.
        seeds: each config is trained with each.
        entries: in the order of the file.
        size_bins: borders, in pixels, of the sizes of objects in the report; none: COCO's.
        baseline: the name of the entry that the others are compared with, or "".
        keep_checkpoints: keep those from before the end of a run too.
    """

    output: Path
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    size_bins: tuple[float, ...] = ()
    baseline: str = ""
    keep_checkpoints: bool = True


class StudyError(ValueError):
    """A mistake in a study file or in what was asked of it, named."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, which lets the later of two equal keys win without a word; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        # the keys that a merge (<<) brought stand before the mapping's own, which may replace them
        if not hasattr(node, "checked"):
            setattr(node, "checked", True)
            for key in keys:
                if keys.count(key) > 1:
                    line = node.start_mark.line + 1
                    raise StudyError(f"{key!r} stands twice in the mapping from line {line} on")
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class _Reader:
    """The values of one study file, checked; what is wrong is named with the file and the key."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def fail(self, key: str, value: object, wanted: str) -> StudyError:
        return StudyError(f"{self.path}: {key}: {value!r} is no {wanted}")

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, value, "text")
        return value

    def numbers(
        self, key: str, default: list[int], kinds: tuple[type, ...], wanted: str
    ) -> list[Any]:
        values = self.values.get(key, default)
        good = isinstance(values, list) and all(type(x) in kinds and x >= 0 for x in values)
        if not good or len(set(values)) < len(values):
            raise self.fail(key, values, wanted)
        return list(values)

    def mapping(self, key: str, value: Any) -> dict[str, Any]:
        value = {} if value is None else value
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self.fail(key, value, "mapping of names to values")
        return value

    def overrides(self, key: str, value: Any) -> list[str]:
        """`{KEY: VALUE}` as the words of a command line."""
        words = []
        for name, one in self.mapping(key, value).items():
            if one is None or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name):
                raise self.fail(f"{key}.{name}", one, "value for a config key (KEY.OF.CONFIG: 1)")
            words += [name, str(one)]
        return words

    def config(self, key: str, value: Any) -> Path:
        """A config file, beside the study file."""
        if not isinstance(value, str) or not value:
            raise self.fail(key, value, "path of a config file")
        path = (self.path.parent / value).resolve()
        if not path.is_file():
            raise StudyError(f"{self.path}: {key}: {value!r} does not exist (looked at {path})")
        return path


_READ: dict[str, Callable[[_Reader], Any]] = {
    "output": lambda read: Path(read.text("output")),
    "seeds": lambda read: tuple(read.numbers("seeds", [0], (int,), "list of different seeds ≥ 0")),
    "size_bins": lambda read: tuple(
        read.numbers("size_bins", [], (int, float), "list of different pixels ≥ 0")
    ),
    "baseline": lambda read: read.text("baseline"),
    "keep_checkpoints": lambda read: _flag(read, "keep_checkpoints", True),
}
_KEYS = (*_READ, "base", "overrides", "runs")


def _flag(read: _Reader, key: str, default: bool) -> bool:
    value = read.values.get(key, default)
    if not isinstance(value, bool):
        raise read.fail(key, value, "boolean: choose from true, false")
    return value


def read_study(path: Path, opts: Sequence[str] = ()) -> Study:
    """A study file, checked.

    Args:
        opts: `KEY VALUE …` for every run, in the place of what the file sets.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the key and the value, for anything wrong in it.
        KeyError: for a key or a name that does not exist, with the choices.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no study file {str(path)!r}")
    read = _Reader(path, _load(path))
    for key in read.values:
        if key not in _KEYS:
            raise unknown_name(str(path), key, _KEYS)
    for key in ("output", "runs"):
        if not read.values.get(key):
            raise StudyError(f"{path}: {key} is missing or empty")
    entries = _entries(read, opts)
    values = {key: value(read) for key, value in _READ.items()}
    if not values["seeds"]:
        raise read.fail("seeds", [], "list of different seeds ≥ 0")
    if values["baseline"] and values["baseline"] not in [entry.name for entry in entries]:
        raise unknown_name(f"{path}: baseline", values["baseline"], [e.name for e in entries])
    try:
        check_edges(values["size_bins"])
    except ValueError as error:
        wanted = "list of growing sizes above 0"
        raise read.fail("size_bins", list(values["size_bins"]), wanted) from error
    return Study(entries=entries, **values)


def seed_list(key: str, text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers, each once.

    Raises:
        ValueError: naming the key, for anything else.
    """
    words = [word for word in text.split(",") if word]
    if not all(word.isdecimal() for word in words):
        raise StudyError(f"{key}: {text!r} is no list of seeds such as 0,1,2")
    return tuple(dict.fromkeys(map(int, words)))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, StudyError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path}: it is no mapping of {', '.join(_KEYS)}")
    return content


def _entries(read: _Reader, opts: Sequence[str]) -> tuple[Entry, ...]:
    if len(opts) % 2:
        raise StudyError(f"the overrides are pairs KEY VALUE; {opts[-1]!r} has no partner")
    shared = read.overrides("overrides", read.values.get("overrides"))
    found = []
    for name, run in read.mapping("runs", read.values["runs"]).items():
        where = f"runs.{name}"
        if not _NAME.fullmatch(name) or name == REPORT:
            wanted = "name of a folder (letters, digits and . _ + -, not 'report')"
            raise read.fail(where, name, wanted)
        run = read.mapping(where, run)
        config = read.config(
            f"{where}.config" if "config" in run else "base",
            run.get("config", read.values.get("base")),
        )
        own = _own_overrides(read, where, run)
        found.append(Entry(name, config, _last_of_each([*shared, *own, *opts])))
    return tuple(found)


def _own_overrides(read: _Reader, where: str, run: dict[str, Any]) -> list[str]:
    """A run is `config` and `overrides`, or config keys alone, with or without `config`."""
    if "overrides" in run:
        for key in run:
            if key not in _RUN_KEYS:
                raise unknown_name(f"{read.path}: {where}", key, _RUN_KEYS)
        return read.overrides(f"{where}.overrides", run["overrides"])
    own = {key: value for key, value in run.items() if key not in _RUN_KEYS}
    return read.overrides(where, own)


def _last_of_each(words: Sequence[str]) -> tuple[str, ...]:
    """`KEY VALUE …` with the last value of each key only."""
    pairs = dict(zip(words[::2], words[1::2]))
    return tuple(word for pair in pairs.items() for word in pair)
