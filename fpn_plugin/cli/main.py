"""`fpn`, the command line: one command per tool."""

from __future__ import annotations

import argparse
import sys
from typing import Sequence

from fpn_plugin.cli import (
    benchmark,
    compare,
    convert,
    demo,
    export,
    predict,
    show,
    study,
    train,
    train_lazy,
    visualize,
)

COMMANDS = {
    "train": train,
    "train-lazy": train_lazy,
    "show": show,
    "predict": predict,
    "visualize": visualize,
    "benchmark": benchmark,
    "compare": compare,
    "study": study,
    "export": export,
    "convert": convert,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command's name and its arguments (default: those of the process).

    Returns:
        the exit code.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        _parser().parse_args([name])  # prints the help, or the commands that there are
    command = COMMANDS[name]
    return command.run(command.parse_args(arguments)) or 0


def _parser() -> argparse.ArgumentParser:
    summaries = [
        f"  {name:11} {(module.__doc__ or '').split(chr(10))[0]}"
        for name, module in COMMANDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="fpn",
        description="\n".join(["Feature pyramids for Detectron2.", "", "commands:", *summaries]),
        epilog="fpn COMMAND --help tells more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser
