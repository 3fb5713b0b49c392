"""The flags that all commands have."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from typing import Any, Sequence

from detectron2.config import CfgNode, get_cfg

from fpn_plugin.config.defaults import add_fpn_config

OVERRIDES_HELP = (
    "config overrides, before or after flags; of a Python config, which is code and is run:"
    " path.key=value"
)
_COMMON = ("traceback", "imports", "trust_imports")


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `fpn <name>`, with the flags that all commands have."""
    parser = argparse.ArgumentParser(
        prog=f"fpn {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_flags(parser)
    return parser


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands have."""
    add = parser.add_argument
    text = "show where in the code a mistake was noticed"
    add("--traceback", action="store_true", help=text)
    text = "a module or file with topologies, fusions, datasets, ... of your own (repeatable)"
    add("--import", action="append", default=[], metavar="FILE.py", dest="imports", help=text)
    text = "run the code that configs name in IMPORTS; without it, only what --import names"
    add("--trust-imports", action="store_true", help=text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse flags and `KEY VALUE` pairs in any order."""
    words, pairs = split_overrides(argv)
    args = parser.parse_intermixed_args(words)
    args.opts = [*args.opts, *pairs]
    return args


def split_overrides(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Take the `KEY VALUE` pairs out of a command line.

    argparse cannot: it takes a key for one more value of a flag such as `--input`, and -1e-3 for a
    flag. Words that are the key of no config, such as a misspelt one, stay where they are.

    Args:
        argv: default: the arguments of the process.

    Returns:
        the other words, and the pairs; a key without a value, before a flag or at the end, is last.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    others: list[str] = []
    pairs: list[str] = []
    lone: list[str] = []
    while words:
        word = words.pop(0)
        if not _is_key(word) or os.path.exists(word):
            others.append(word)
        elif words and not words[0].startswith("--"):
            pairs += [word, words.pop(0)]
        else:
            lone.append(word)
    return others, [*pairs, *lone]


def _is_key(word: str) -> bool:
    """Whether a word is a config's key, or may be one in a section that it has."""
    section, dot, rest = word.partition(".")
    if not re.fullmatch(r"[\w.]+", word):  # such as the pairs of --baseline-opts 'KEY VALUE …'
        return False
    node = _defaults().get(section)
    if isinstance(node, CfgNode):
        return bool(rest) and rest.partition(".")[0].isupper()
    return node is not None and not dot


@functools.cache
def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    return cfg


def own_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of one command alone, by name."""
    return {name: value for name, value in vars(args).items() if name not in _COMMON}
