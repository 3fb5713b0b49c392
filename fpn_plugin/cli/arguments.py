"""The flags that all commands have."""

from __future__ import annotations

import argparse
from typing import Any

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


def own_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of one command alone, by name."""
    return {name: value for name, value in vars(args).items() if name not in _COMMON}
