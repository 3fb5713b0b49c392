"""Reading YAML configs: Detectron2's format with `_BASE_`, and no code of a file is run.

Detectron2 itself turns to `yaml.unsafe_load` where a file has Python's tags, which calls whatever
they name. Its own Base-RetinaNet.yaml has one, `!!python/object/apply:eval`, around arithmetic;
that is worked out here without Python's `eval`.
"""

from __future__ import annotations

import os
from typing import Any, Mapping, Sequence

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from fpn_plugin.arithmetic import evaluate
from fpn_plugin.registry import UnknownNameError, unknown_name

BASE = "_BASE_"
ARGS = "MODEL.BOTTOM_UP.ARGS"  # takes any key
_VALUES = 100_000  # in a whole file; a few lines with anchors can stand for any number


class _Loader(yaml.SafeLoader):
    """Plain YAML, and two of Python's tags that do no harm."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copy what `<<` names into a section; yaml keeps each of its keys as often as it comes."""
        super().flatten_mapping(node)
        if len(node.value) > _VALUES:
            raise yaml.constructor.ConstructorError(
                problem=f"a section of more than {_VALUES} keys", problem_mark=node.start_mark
            )


def _tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


def _arithmetic(loader: _Loader, node: yaml.Node) -> Any:
    words = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(words) != 1 or not isinstance(words[0], str):
        raise yaml.constructor.ConstructorError(problem="eval takes one text")
    try:
        return evaluate(words[0])
    except ValueError as error:
        problem = f"{error} (no code of a config is run)"
        raise yaml.constructor.ConstructorError(problem=problem) from error


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _arithmetic)


def read_yaml(path: str) -> dict[str, Any]:
    """What a YAML file says; an empty one says nothing.

    Raises:
        ValueError: naming the file, if it cannot be read, is not YAML, calls code, or holds
            anything else than keys with values.
    """
    try:
        with PathManager.open(path, "r") as stream:
            content = yaml.load(stream, _Loader)
    # yaml lets the ValueError of a date such as 2000-99-99 through, and others of odd scalars
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from error
    except RecursionError:
        raise ValueError(f"{path}: its lists or sections are nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not keys with values")
    _check_size(content, path)
    return content


def _reason(error: Exception) -> str:
    """One line, with the place in the file where yaml says it."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        hint = ""
        if "python/" in str(error.problem):
            hint = " (a tag of Python calls code, and no code of a config is run)"
        return f"is no plain YAML{place}: {error.problem or error.context}{hint}"
    return f"cannot be read: {str(error).partition(chr(10))[0]}"


def _check_size(content: Any, path: str) -> None:
    """Also ends where an anchor stands inside of what it names."""
    left, count = [content], 0
    while left:
        value = left.pop()
        count += 1
        if count > _VALUES:
            raise ValueError(f"{path}: its anchors stand for more than {_VALUES} values")
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """Enter a YAML config, with the files of its `_BASE_` below it, into a config, in place.

    Raises:
        FileNotFoundError: if a `_BASE_` does not exist.
        KeyError: for a key that does not exist.
        ValueError: for what :func:`read_yaml` refuses, or a value of another type than the key's.
            All name the file.
    """
    content = _with_base(path, ())
    version = content.pop("VERSION", cfg.VERSION)
    if version != cfg.VERSION:
        raise ValueError(
            f"{path}: VERSION {version!r}: only {cfg.VERSION} is read (Detectron2's since 2019);"
            " detectron2.config.upgrade_config makes one of the other"
        )
    check_keys(cfg, content, path)
    enter(cfg, lambda: cfg.merge_from_other_cfg(CfgNode(content)), path)


def enter(cfg: CfgNode, merge: Any, where: str) -> None:
    """Let yacs merge values into a config; its errors name `where`.

    Args:
        merge: does it.

    Raises:
        ValueError: for a value of another type than the key's, None among them.
    """
    before = leaves(cfg)
    try:
        merge()
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:
        # all that yacs, and the parser of Python's literals that it reads texts with, raise
        raise ValueError(f"{where}: {error or type(error).__name__}") from error
    for key, value in leaves(cfg).items():
        if value is None and before.get(key) is not None:
            kind = type(before[key]).__name__
            raise ValueError(f"{where}: {key}: None is given, but it takes a {kind}")


def _with_base(path: str, above: Sequence[str]) -> dict[str, Any]:
    """A file's values over those of its `_BASE_`."""
    if path in above:
        raise ValueError(f"{path}: is its own {BASE}, by way of {above[-1]}")
    content = read_yaml(path)
    bases = content.pop(BASE, [])
    bases = bases if isinstance(bases, list) else [bases]
    merged: dict[str, Any] = {}
    for base in bases:
        if not isinstance(base, str) or not base:
            raise ValueError(f"{path}: {BASE} {base!r} is no path of a file")
        _overlay(merged, _with_base(_base_path(base, path), (*above, path)), path)
    _overlay(merged, content, path)
    return merged


def _base_path(base: str, path: str) -> str:
    """Relative to the file that names it, unless it is absolute or an address."""
    if "://" in base:
        return base
    found = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(base)))
    if not PathManager.isfile(found):
        raise FileNotFoundError(f"{path}: {BASE} {base!r}: there is no file {found}")
    return found


def _overlay(below: dict[str, Any], above: dict[str, Any], path: str, prefix: str = "") -> None:
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise ValueError(f"{path}: {prefix}{key} is a section here, but a value in {BASE}")
            _overlay(below[key], value, path, f"{prefix}{key}.")
        else:
            below[key] = value


def check_keys(cfg: CfgNode, content: Mapping[Any, Any], where: str, prefix: str = "") -> None:
    """Refuse keys that a config does not have.

    Raises:
        KeyError: naming `where`, the key and those beside it.
        ValueError: for a section in the place of a value or the other way round.
    """
    for key, value in content.items():
        full = f"{prefix}{key}"
        if not isinstance(key, str) or (key not in cfg and not cfg.is_new_allowed()):
            raise unknown_key(full, cfg, where)
        is_section = isinstance(cfg.get(key), CfgNode)
        if is_section != isinstance(value, Mapping) and key in cfg and cfg[key] is not None:
            kind = "a section of keys" if is_section else f"a {type(cfg[key]).__name__}"
            raise ValueError(f"{where}: {full} is {kind}, but {value!r} is given")
        if is_section:
            check_keys(cfg[key], value, where, f"{full}.")


def unknown_key(key: str, cfg: CfgNode, where: str = "") -> UnknownNameError:
    """An error that lists the keys beside the wrong one: the nearest section of it that exists."""
    known = keys(cfg)
    section = key.rpartition(".")[0]
    while section and section not in known:
        section = section.rpartition(".")[0]
    prefix = section + "." if section else ""
    beside = [name for name in known if name.startswith(prefix) and "." not in name[len(prefix) :]]
    return unknown_name(f"{where}: config key" if where else "config key", key, beside)


def keys(node: CfgNode, prefix: str = "") -> set[str]:
    """All keys of a config, sections and values, with dots."""
    found: set[str] = set()
    for key, value in node.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, CfgNode):
            found |= keys(value, f"{prefix}{key}.")
    return found


def leaves(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """The values of a config by their keys, but for the arguments of the bottom-up network."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        full = f"{prefix}{key}"
        if isinstance(value, CfgNode):
            found.update(leaves(value, f"{full}.") if full != ARGS else {})
        else:
            found[full] = value
    return found
