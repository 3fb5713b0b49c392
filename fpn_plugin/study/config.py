"""Study files: which configs are trained with which seeds, and how they are compared."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fpn_plugin import plugins
from fpn_plugin.config.files import find_config_file
from fpn_plugin.evaluation.size_bins import check_edges
from fpn_plugin.modeling.python_config import is_override
from fpn_plugin.paths import from_folder
from fpn_plugin.registry import unknown_name
from fpn_plugin.yaml_files import read_yaml

REPORT = "report"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_CONFIG_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_RUN_KEYS = ("config", "overrides")


def _key(wanted: str, **default: Any) -> Any:
    """A key of a study file; `wanted` is what its error asks for."""
    return field(metadata={"wanted": wanted}, **default)


@dataclass
class _StudyFile:
    """The keys of a study file, with their types and defaults.

    Attributes:
        base: the config, a file or a name, of runs that name none.
        overrides: config keys for all runs.
        runs: by name, a mapping of config keys, or `config` (a file) and `overrides`.
        the others: as in :class:`Study`.
    """

    output: str = _key("text", default="")
    seeds: List[int] = _key("list of different seeds ≥ 0", default_factory=lambda: [0])
    size_bins: List[float] = _key("list of growing sizes above 0", default_factory=list)
    baseline: str = _key("text", default="")
    keep_checkpoints: bool = _key("boolean: choose from true, false", default=True)
    base: Optional[str] = _key("path of a config file", default=None)
    overrides: Optional[Dict[str, Any]] = _key("mapping of names to values", default=None)
    runs: Optional[Dict[str, Any]] = _key("mapping of names to values", default=None)


_WANTED = {key.name: key.metadata["wanted"] for key in dataclasses.fields(_StudyFile)}


@dataclass(frozen=True)
class NamedConfig:
    """A config of a study.

    Attributes:
        name: of its folder.
        file: the YAML file.
        overrides: `KEY VALUE …` as on a command line, those of all runs first.
    """

    name: str
    file: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """The content of a study file.

    Attributes:
        output: the folder of all runs and of the report.
        seeds: each config is trained with each.
        configs: in the order of the file.
        size_bins: borders, in pixels, of the sizes of objects in the report; none: COCO's.
        baseline: the name of the config that the others are compared with, or "".
        keep_checkpoints: keep those from before the end of a run too.
    """

    output: Path
    seeds: tuple[int, ...]
    configs: tuple[NamedConfig, ...]
    size_bins: tuple[float, ...] = ()
    baseline: str = ""
    keep_checkpoints: bool = True


class StudyError(ValueError):
    """A mistake in a study file or in the options of a study."""


def read_study(path: Path, opts: Sequence[str] = ()) -> Study:
    """Read and check a study file.

    Args:
        path: of the file, or the name of a study among this plugin's configs.
        opts: `KEY VALUE …` for every run, which replace what the file sets.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the key and the value, for anything wrong in it.
        KeyError: for a key or a name that does not exist, with the choices.
    """
    path = Path(find_config_file(str(path), "the study"))
    content = _load(path)
    values = _with_defaults(path, content)
    for key in ("output", "runs"):
        if not values[key]:
            raise StudyError(f"{path}: {key} is missing or empty")
    seeds = values["seeds"]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise _error(path, "seeds", seeds)
    try:
        check_edges(values["size_bins"])
    except ValueError as error:
        raise _error(path, "size_bins", content["size_bins"]) from error
    configs = _configs(path, values, opts)
    names = [config.name for config in configs]
    if values["baseline"] and values["baseline"] not in names:
        raise unknown_name(f"{path}: baseline", values["baseline"], names)
    return Study(
        output=Path(values["output"]),
        seeds=tuple(seeds),
        configs=configs,
        size_bins=tuple(values["size_bins"]),
        baseline=values["baseline"],
        keep_checkpoints=values["keep_checkpoints"],
    )


def parse_seeds(option: str, text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers, each once.

    Raises:
        ValueError: naming the option, for anything else.
    """
    words = [word for word in text.split(",") if word]
    if not all(word.isdecimal() for word in words):
        raise StudyError(f"{option}: {text!r} is no list of seeds such as 0,1,2")
    return tuple(dict.fromkeys(map(int, words)))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(str(path))
    except ValueError as error:
        raise StudyError(str(error)) from error
    return {str(key): value for key, value in content.items()}


def _with_defaults(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content with the defaults of missing keys, every value of its key's type."""
    schema = OmegaConf.structured(_StudyFile)
    for key, value in content.items():
        if key not in _WANTED:
            raise unknown_name(str(path), key, _WANTED)
        try:
            schema[key] = value
        except OmegaConfBaseException as error:
            raise _error(path, key, value) from error
    values: Any = OmegaConf.to_container(schema)
    for key, value in content.items():
        # OmegaConf converts what it can ('no' and 1 to booleans, 3 to text): here it is a mistake
        if type(values[key]) is not type(value) or values[key] != value:
            raise _error(path, key, value)
    return values


def _error(path: Path, key: str, value: object, wanted: str = "") -> StudyError:
    return StudyError(f"{path}: {key}: {value!r} is no {wanted or _WANTED[key]}")


def _configs(path: Path, values: dict[str, Any], opts: Sequence[str]) -> tuple[NamedConfig, ...]:
    # of Python configs, whose overrides are path.key=value
    opts = [x for text in opts for x in (text.split("=", 1) if is_override(text) else [text])]
    if len(opts) % 2:
        raise StudyError(f"the overrides are pairs KEY VALUE; {opts[-1]!r} has no partner")
    shared = _words(path, "overrides", values["overrides"])
    configs = []
    for name, run in values["runs"].items():
        where = f"runs.{name}"
        if not _FOLDER_NAME.fullmatch(name) or name == REPORT:
            wanted = "name of a folder (letters, digits and . _ + -, not 'report')"
            raise _error(path, where, name, wanted)
        run = _mapping(path, where, run)
        if "config" in run:
            file = _config_file(path, f"{where}.config", run["config"])
        else:
            file = _config_file(path, "base", values["base"])
        words = [*shared, *_overrides_of_run(path, where, run), *opts]
        last = dict(zip(words[::2], words[1::2]))  # the last value of each key
        configs.append(
            NamedConfig(name, file, tuple(word for pair in last.items() for word in pair))
        )
    return tuple(configs)


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _error(path, key, value, _WANTED["runs"])
    return value


def _config_file(path: Path, key: str, value: Any) -> Path:
    """A config file, relative to the study file, or a config by its name."""
    if not isinstance(value, str) or not value:
        raise _error(path, key, value, _WANTED["base"])
    try:
        return Path(find_config_file(value, f"{path}: {key}:", str(path.parent.resolve())))
    except FileNotFoundError as error:
        raise StudyError(str(error)) from error


def _overrides_of_run(path: Path, where: str, run: dict[str, Any]) -> list[str]:
    """A run is `config` and `overrides`, or config keys alone, with or without `config`."""
    if "overrides" in run:
        for key in run:
            if key not in _RUN_KEYS:
                raise unknown_name(f"{path}: {where}", key, _RUN_KEYS)
        return _words(path, f"{where}.overrides", run["overrides"])
    return _words(path, where, {key: run[key] for key in run if key not in _RUN_KEYS})


def _words(path: Path, where: str, overrides: Any) -> list[str]:
    """`{KEY: VALUE}` as the words of a command line."""
    words = []
    for key, value in _mapping(path, where, overrides).items():
        if value is None or not _CONFIG_KEY.fullmatch(key):
            raise _error(path, f"{where}.{key}", value, "value for a config key (KEY.OF.CONFIG: 1)")
        if key == plugins.KEY and isinstance(value, list):
            value = [plugins.beside(name, str(path)) for name in value]
        if key.startswith("DATASETS.OWN."):  # as in every file: relative to it
            value = from_folder(str(value), str(path.parent))
        words += [key, str(value)]
    return words
