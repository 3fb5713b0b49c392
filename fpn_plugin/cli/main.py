"""`fpn`, the command line: one command per tool."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import select
import sys
from pathlib import Path
from typing import Iterator, Sequence

import detectron2
import torch

from fpn_plugin import plugins
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
    visualize,
)
from fpn_plugin.cli.mistakes import mistakes
from fpn_plugin.engine.peers import meet
from fpn_plugin.engine.place import find_place, refuse_launcher
from fpn_plugin.registry import close_name
from fpn_plugin.version import __version__

_DESCRIPTION = """Feature pyramids for Detectron2: which topology, which fusion and which network
underneath a detector is said by its config."""
_EPILOG = """--config-file takes a file, or a name among this plugin's configs or Detectron2's,
as its model_zoo does: COCO-InstanceSegmentation/mask_rcnn_R_50_BiFPN_1x.yaml

fpn COMMAND --help                      what a command does, and its flags
fpn demo trees --output output/demo     see a detector train, also on a CPU"""
_READER_IS_GONE = 128 + 13  # what a shell says of a command that SIGPIPE has ended

COMMANDS = {
    "train": train,
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
        the exit code: 0, or what the command's help says.

    Raises:
        SystemExit: 2 for a mistake of the user, whose message is on standard error; also that of
            argparse. An unexpected error is raised as it is.
    """
    logging.raiseExceptions = False  # else every line of a log prints one when its reader is gone
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where an error can be caught
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # as of `fpn show … | head`; nothing more is to be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_IS_GONE


def _run(argv: Sequence[str]) -> int:
    name, *arguments = argv or ["--help"]
    if name not in COMMANDS:
        _refuse(name)
    command = COMMANDS[name]
    with mistakes(name):
        place = find_place()
    with _quiet(place is not None and place.rank > 0):
        if command is not train:
            with mistakes(name):
                refuse_launcher(place, name)
        args = command.parse_args(arguments)
    with mistakes(name, args.traceback):
        if command is not train:
            load_plugins(args)
            return command.run(args) or 0
        with meet(place, args) as args.peers:
            load_plugins(args)
            return command.run(args) or 0


@contextlib.contextmanager
def _quiet(is_quiet: bool) -> Iterator[None]:
    """Where several processes have the same command line, one of them says what is wrong with it,
    or prints its help."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if is_quiet:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def load_plugins(args: argparse.Namespace) -> None:
    """Import what the command line names, before anything needs it."""
    plugins.trust(args.trust_imports)
    plugins.load(args.imports, "--import")
    plugins.load(plugins.named_by_overrides(getattr(args, "opts", [])), plugins.KEY)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _refuse(name: str) -> None:
    """Print the help or the version, or say that there is no such command, and exit."""
    parser = _parser()
    if name.startswith("-"):
        parser.parse_args([name])
    close = close_name(name, list(COMMANDS))
    hint = f"; did you mean {close!r}?" if close else ""
    parser.error(f"there is no command {name!r}{hint} (there are: {', '.join(COMMANDS)})")


def _parser() -> argparse.ArgumentParser:
    summaries = [
        f"  {name:11} {(module.__doc__ or '').split(chr(10))[0]}"
        for name, module in COMMANDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="fpn",
        usage="fpn COMMAND …",
        description="\n".join([_DESCRIPTION, "", "commands:", *summaries]),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = (
        f"fpn_plugin {__version__}, {Path(__file__).parents[1]} (Detectron2"
        f" {detectron2.__version__}, torch {torch.__version__}, Python {platform.python_version()})"
    )
    parser.add_argument(
        "--version", action="version", version=version, help="and what it runs with"
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
