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
    show,
    study,
    train,
    visualize,
)
from fpn_plugin.cli.mistakes import mistakes

COMMANDS = {
    "train": train,
    "show": show,
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
        the exit code: 0, or what the command's help says.

    Raises:
        SystemExit: 2 for a mistake of the user, whose message is on standard error; also that of
            argparse. An unexpected error is raised as it is.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        _parser().parse_args([name])  # prints the help, or the commands that there are
    command = COMMANDS[name]
    args = command.parse_args(arguments)
    with mistakes(name, args.traceback):
        return command.run(args) or 0


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
