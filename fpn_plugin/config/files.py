"""Entering YAML files and command lines into a config.

Files have Detectron2's format with `_BASE_`; nothing that stands in them is executed.
"""

from __future__ import annotations

import ast
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from detectron2.config import CfgNode

from fpn_plugin import plugins
from fpn_plugin.checkpoint.record import read_record
from fpn_plugin.config.defaults import ARGS, GONE
from fpn_plugin.config.heads import spell_auto
from fpn_plugin.paths import configs_dir, from_folder, zoo_dir
from fpn_plugin.registry import UnknownNameError, close_name, unknown_name
from fpn_plugin.yaml_files import read_yaml

logger = logging.getLogger(__name__)

BASE = "_BASE_"
CONFIG_FILE = "--config-file"
_OWN_PATHS = "_fpn_plugin_own_paths"
_SUFFIXES = (".yaml", ".py")


def find_config_file(
    name: str, key: str = CONFIG_FILE, folder: str = "", zoo_first: bool = False
) -> str:
    """The path of a config: of a file, or of one that this plugin or Detectron2 has by that name.

    Names are as `model_zoo` has them, such as
    `COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml`; `configs/` may stand before them, and
    `.yaml` may be left out. A file comes first, then this plugin's config.

    Args:
        key: what names the config, for messages.
        folder: that relative paths start from; "" for the current one.
        zoo_first: whether Detectron2's config comes before this plugin's.

    Raises:
        FileNotFoundError: with similar names.
    """
    file = os.path.join(folder, os.path.expanduser(name))
    file = os.path.normpath(file) if folder else file
    if os.path.isfile(file):
        return file
    roots = {"this plugin's": configs_dir(), "Detectron2's": zoo_dir()}
    stem = os.path.normpath(name).removeprefix(f"configs{os.sep}")
    is_name = not os.path.isabs(stem) and os.pardir not in Path(stem).parts
    found = {}
    for owner in list(roots)[:: -1 if zoo_first else 1]:
        for path in (roots[owner] / stem, roots[owner] / f"{stem}.yaml"):
            if owner not in found and is_name and path.is_file():
                found[owner] = str(path)
    if not found:
        hint = _similar_names(stem, list(roots.values()))
        place = f" {file}" if folder else " of this name"
        raise FileNotFoundError(
            f"{key} {name!r}: there is no file{place}, and neither this plugin nor Detectron2 has"
            f" such a config{hint}"
        )
    (owner, chosen), *others = found.items()
    other = f"; {others[0][0]} of this name is {others[0][1]}" if others else ""
    logger.info("%s %s: taking %s, %s%s", key, name, owner, chosen, other)
    return chosen


def _similar_names(name: str, roots: Sequence[Path]) -> str:
    """The nearest name in each folder of configs, as a question."""
    near = []
    stem = Path(name).stem if name.endswith(_SUFFIXES) else Path(name).name
    for root in roots:
        names = [
            path.relative_to(root).as_posix()
            for suffix in reversed(_SUFFIXES)  # of two files of one name, the last is YAML
            for path in sorted(root.rglob(f"*{suffix}"))
        ]
        by_stem = {Path(each).stem: each for each in names}
        same = by_stem.get(close_name(stem, list(by_stem)), "")
        near.append(close_name(name, names, 0.95) or same or close_name(name, names))
    meant = " or ".join(dict.fromkeys(filter(None, near)))
    return f"; did you mean {meant}?" if meant else ""


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML config, over the files of its `_BASE_`, into a config, in place.

    Paths of `DATASETS.OWN` are relative to the file that names them, and become absolute; all other
    paths stay as they are, as Detectron2 has it.

    Args:
        path: of the file; or of a checkpoint, for the config that its run recorded in it.

    Raises:
        FileNotFoundError: if a `_BASE_` does not exist.
        KeyError: for a key that does not exist.
        ValueError: for what :func:`read_yaml` refuses, a value of another type than the key's, or
            a key that is gone. All name the file.
    """
    own_paths: dict[str, tuple[str, str]] = {}
    content = read_record(path).get("config") or _read_with_base(path, (), own_paths)
    drop_gone_keys(content, path)
    version = content.pop("VERSION", cfg.VERSION)
    if version != cfg.VERSION:
        raise ValueError(
            f"{path}: VERSION {version!r}: only {cfg.VERSION} is read (Detectron2's since 2019);"
            " detectron2.config.upgrade_config converts the other"
        )
    check_keys(cfg, content, path)
    enter(cfg, lambda: cfg.merge_from_other_cfg(CfgNode(content)), path)
    vars(cfg)[_OWN_PATHS] = own_paths  # beside the keys: its dump does not have it


def settle_own_paths(cfg: CfgNode) -> None:
    """Make the paths of `DATASETS.OWN` absolute, in place, when file and command line are merged:
    those of the command line are relative to the current folder.

    Raises:
        ValueError: naming both places, for a path of a file that is only there when it is taken
            from the current folder, as earlier versions took it.
    """
    own_paths = vars(cfg).get(_OWN_PATHS, {})
    for key, value in cfg.DATASETS.OWN.items():
        given, file = own_paths.get(value, ("", ""))
        here = from_folder(given)
        if file and not os.path.exists(value) and os.path.exists(here):
            better = os.path.relpath(here, os.path.dirname(file) or os.curdir)
            raise ValueError(
                f"{file}: DATASETS.OWN.{key}: {given!r} is relative to this file, but there is no"
                f" {value}. There is {here}, relative to the current folder, as earlier versions"
                f" read it: write {better!r} (or that whole path) into the file"
            )
        cfg.DATASETS.OWN[key] = from_folder(value)


def merge_overrides(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge the `KEY VALUE` pairs of a command line into a config, in place.

    Raises:
        KeyError: for a key that does not exist.
        ValueError: for a key without a value, a value of another type than the key's, or a key that
            is gone.
    """
    if flags := [opt for opt in opts if opt.startswith("--")]:
        raise ValueError(f"{flags[0]} stands after a KEY VALUE override: flags go first")
    if len(opts) % 2:
        raise ValueError(
            f"the overrides are pairs KEY VALUE; {opts[-1]!r} at their end has no partner"
        )
    pairs = _enter_arguments(cfg, spell_auto(opts))
    known, values = keys(cfg), leaves(cfg)
    for key, value in zip(pairs[::2], pairs[1::2]):
        if key in GONE:
            raise ValueError(gone_text(key, value))
        if key not in known:
            raise unknown_key(key, cfg)
        if key not in values and not key.startswith(f"{ARGS}."):
            raise ValueError(f"{key} is a section of keys: set <key> of it by {key}.<key> VALUE")
        enter(cfg, partial(cfg.merge_from_list, [key, value]), key)


def gone_text(key: str, value: object) -> str:
    """What is said of a key that is gone."""
    return f"{key}: {value!r} is given, but the key is gone: {GONE[key].reason}. Remove it"


def drop_gone_keys(content: Mapping[str, Any], where: str) -> None:
    """Remove keys that are gone from what a file says, in place.

    A run's config.yaml has every key of the version that wrote it, at its default where nobody set
    it; only another value is an error.

    Raises:
        ValueError: naming `where`, the key and its value.
    """
    for key, gone in GONE.items():
        *sections, leaf = key.split(".")
        node: Any = content
        for section in sections:
            node = node.get(section) if isinstance(node, Mapping) else None
        if isinstance(node, dict) and leaf in node:
            value = node.pop(leaf)
            if type(value) is not type(gone.default) or value != gone.default:
                raise ValueError(f"{where}: {gone_text(key, value)}")


def enter(cfg: CfgNode, merge: Callable[[], Any], where: str) -> None:
    """Let yacs merge values into a config; its errors name `where`.

    Raises:
        ValueError: for a value of another type than the key's, None among them.
    """
    before = leaves(cfg)
    try:
        merge()
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:
        # all that yacs, and the parser of Python's literals that it reads texts with, raise
        hint = ""
        if str(error).startswith("Type mismatch (<class 'list'> vs. <class 'str'>)"):
            hint = "; as a list of names it is written ['p2', 'p3'], in quotes on a command line"
        raise ValueError(f"{where}: {error or type(error).__name__}{hint}") from error
    for key, value in leaves(cfg).items():
        if value is None and before.get(key) is not None:
            expected = type(before[key]).__name__
            raise ValueError(f"{where}: {key}: None is given, but it takes a {expected}")


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
            expected = "a section of keys" if is_section else f"a {type(cfg[key]).__name__}"
            raise ValueError(f"{where}: {full} is {expected}, but {value!r} is given")
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
    place = f"{where}: config key" if where else "config key"
    # the key itself may be right, and its section wrong
    leaf = key.rpartition(".")[2].lower()
    same = [name for name in sorted(known) if name.rpartition(".")[2].lower() == leaf]
    return unknown_name(place, key, beside, close_name(key, [*beside, *same]))


def keys(node: CfgNode, prefix: str = "") -> set[str]:
    """All keys of a config, sections and values, with dots."""
    names: set[str] = set()
    for key, value in node.items():
        names.add(f"{prefix}{key}")
        if isinstance(value, CfgNode):
            names |= keys(value, f"{prefix}{key}.")
    return names


def leaves(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """The values of a config by their keys, except the arguments of the bottom-up network."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        full = f"{prefix}{key}"
        if isinstance(value, CfgNode):
            values.update(leaves(value, f"{full}.") if full != ARGS else {})
        else:
            values[full] = value
    return values


def _read_with_base(
    path: str, above: Sequence[str], own_paths: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """A file's values over those of its `_BASE_`.

    Args:
        own_paths: gets the paths of `DATASETS.OWN` that were relative: what was written and where,
            by what it became.
    """
    if path in above:
        raise ValueError(f"{path}: is its own {BASE}, by way of {above[-1]}")
    content = read_yaml(path)
    bases = content.pop(BASE, [])
    drop_gone_keys(content, path)
    if isinstance(imports := content.get(plugins.KEY), list):
        content[plugins.KEY] = [plugins.beside(name, path) for name in imports]
    own_paths.update(_own_paths_from_file(content, path))
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise ValueError(f"{path}: {BASE} {base!r} is no path of a file")
        if "://" not in base:  # else an address
            base = find_config_file(base, f"{path}: {BASE}", os.path.dirname(path))
        _overlay(merged, _read_with_base(base, (*above, path), own_paths), path)
    _overlay(merged, content, path)
    return merged


def _own_paths_from_file(content: dict[str, Any], path: str) -> dict[str, tuple[str, str]]:
    """Take the paths of `DATASETS.OWN` in a file from its folder, in place.

    Returns:
        what was written, and the file, by what it became.
    """
    datasets = content.get("DATASETS")
    own = datasets.get("OWN") if isinstance(datasets, dict) else None
    changed = {}
    if isinstance(own, dict) and "://" not in path:
        for key, value in own.items():
            if isinstance(value, str) and (absolute := from_folder(value, os.path.dirname(path))):
                own[key] = absolute
                changed.update({absolute: (value, path)} if absolute != value else {})
    return changed


def _overlay(below: dict[str, Any], above: dict[str, Any], path: str, prefix: str = "") -> None:
    """Merge nested values into others, in place; a file adds its `IMPORTS` to those below it."""
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise ValueError(f"{path}: {prefix}{key} is a section here, but a value in {BASE}")
            _overlay(below[key], value, path, f"{prefix}{key}.")
        elif f"{prefix}{key}" == plugins.KEY and isinstance(below.get(key), list):
            below[key] = [*below[key], *value] if isinstance(value, list) else value
        else:
            below[key] = value


def _enter_arguments(cfg: CfgNode, opts: Sequence[Any]) -> list[Any]:
    """Make room for arguments of the bottom-up network, whose names and types its library knows:
    merging a list refuses new keys, also where a file may have them, and other types.

    Returns:
        the pairs, without those that set all arguments at once: they are in the config.
    """
    pairs: list[Any] = []
    for key, value in zip(opts[::2], opts[1::2]):
        name = key.removeprefix(f"{ARGS}.")
        if key == ARGS:
            cfg.MODEL.BOTTOM_UP.ARGS = CfgNode(_parse_arguments(value), new_allowed=True)
            pairs = [x for k, v in zip(pairs[::2], pairs[1::2]) if k.find(ARGS) for x in (k, v)]
            continue
        if key != name and name and "." not in name:
            cfg.MODEL.BOTTOM_UP.ARGS[name] = None
        pairs += [key, value]
    return pairs


def _parse_arguments(value: str) -> dict[str, Any]:
    try:
        arguments = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        arguments = None
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(
            f"{ARGS}: {value!r} is no dict as Python writes it ({{'drop_path_rate': 0.1}}); one"
            f" argument is set by {ARGS}.<name> VALUE"
        )
    return arguments
