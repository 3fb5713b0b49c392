"""The `KEY VALUE` pairs of a command line, entered into a config."""

from __future__ import annotations

import ast
from functools import partial
from typing import Any, Sequence

from detectron2.config import CfgNode

from fpn_plugin.config_files import ARGS, enter, keys, leaves, unknown_key
from fpn_plugin.heads.auto import spell_auto


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
    known, values = keys(cfg), leaves(cfg)
    for key, value in zip(pairs[::2], pairs[1::2]):
        if key not in known:
            raise unknown_key(key, cfg)
        if key not in values and not key.startswith(f"{ARGS}."):
            raise ValueError(f"{key} is a section of keys: set <key> of it by {key}.<key> VALUE")
        enter(cfg, partial(cfg.merge_from_list, [key, value]), key)


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
            cfg.MODEL.BOTTOM_UP.ARGS = CfgNode(_arguments(value), new_allowed=True)
            pairs = [x for k, v in zip(pairs[::2], pairs[1::2]) if k.find(ARGS) for x in (k, v)]
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
            f"{ARGS}: {value!r} is no dict as Python writes it ({{'drop_path_rate': 0.1}}); one"
            f" argument is set by {ARGS}.<name> VALUE"
        )
    return arguments
