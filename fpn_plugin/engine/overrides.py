"""The `KEY VALUE` pairs of a command line, entered into a config."""

from __future__ import annotations

import ast
from typing import Any, Sequence

from detectron2.config import CfgNode

from fpn_plugin.heads.auto import spell_auto
from fpn_plugin.registry import unknown_name

_ARGS = "MODEL.BOTTOM_UP.ARGS"


def merge_overrides(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Enter `KEY VALUE` pairs into a config, in place.

    Raises:
        KeyError: for a key that does not exist.
        ValueError: for a key without a value, or a value of another type than the key's.
    """
    if flags := [opt for opt in opts if opt.startswith("--")]:
        raise ValueError(f"{flags[0]} stands after a KEY VALUE override: flags go first")
    if len(opts) % 2:
        raise ValueError(
            f"the overrides are pairs KEY VALUE; {opts[-1]!r} at their end has no partner"
        )
    pairs = _enter_arguments(cfg, spell_auto(opts))
    known = _keys(cfg)
    for key in pairs[::2]:
        if key not in known:
            raise _unknown_key(key, known)
    cfg.merge_from_list(pairs)


def _enter_arguments(cfg: CfgNode, opts: Sequence[Any]) -> list[Any]:
    """Make room for arguments of the bottom-up network, whose names and types its library knows:
    merging a list refuses new keys, also where a file may have them, and other types.

    Returns:
        the pairs, without those that set all arguments at once: they are in the config.
    """
    pairs: list[Any] = []
    for key, value in zip(opts[::2], opts[1::2]):
        name = key.removeprefix(f"{_ARGS}.")
        if key == _ARGS:
            cfg.MODEL.BOTTOM_UP.ARGS = CfgNode(_arguments(value), new_allowed=True)
            pairs = [x for k, v in zip(pairs[::2], pairs[1::2]) if k.find(_ARGS) for x in (k, v)]
            continue
        if key != name and name and "." not in name:
            cfg.MODEL.BOTTOM_UP.ARGS[name] = None
        pairs += [key, value]
    return pairs


def _arguments(value: str) -> dict[str, Any]:
    try:
        arguments = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        arguments = None
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(
            f"{_ARGS}: {value!r} is no dict as Python writes it ({{'drop_path_rate': 0.1}}); one"
            f" argument is set by {_ARGS}.<name> VALUE"
        )
    return arguments


def _keys(node: CfgNode, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in node.items():
        keys.add(prefix + key)
        if isinstance(value, CfgNode):
            keys |= _keys(value, f"{prefix}{key}.")
    return keys


def _unknown_key(key: str, known: set[str]) -> KeyError:
    """An error that lists the keys beside the wrong one: the nearest section of it that exists."""
    section = key.rpartition(".")[0]
    while section and section not in known:
        section = section.rpartition(".")[0]
    prefix = section + "." if section else ""
    beside = [name for name in known if name.startswith(prefix) and "." not in name[len(prefix) :]]
    return unknown_name("config key", key, beside)
