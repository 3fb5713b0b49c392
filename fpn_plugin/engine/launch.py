"""Starts the processes of a run, and says which of them died and how."""

from __future__ import annotations

import argparse
import multiprocessing as mp
import re
import signal
import time
from datetime import timedelta
from typing import Any, Callable

from detectron2.engine.launch import DEFAULT_TIMEOUT, launch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fpn_plugin.engine.folder_lock import Shared

# what gloo and NCCL say when another process is gone
_LOST_PEER = re.compile(r"(?i)connection (closed|reset)|closed by peer|remote process exited")
_GRACE = 5.0  # seconds


class RankError(RuntimeError):
    """One of the processes of a run failed, and the others of this machine were stopped."""


def add_rank_timeout(parser: argparse.ArgumentParser) -> None:
    """Add `--rank-timeout`."""
    parser.add_argument(
        "--rank-timeout",
        type=float,
        default=DEFAULT_TIMEOUT.total_seconds() / 60,
        metavar="MINUTES",
        help="with several processes: how long one waits for a silent other; longer than the main"
        " process takes to score an evaluation (default: %(default)g)",
    )


def launch_ranks(main: Callable[..., Any], args: Any, arguments: tuple[Any, ...]) -> None:
    """Detectron2's `launch`; with one process `main` is called in this one.

    Args:
        main: runs in each process.
        args: of `fpn_plugin.engine.setup.argument_parser`; `rank_timeout` is in minutes.
        arguments: of `main`.

    Raises:
        RankError: if one of several processes was killed or raised an error.
    """
    try:
        launch(
            _run_rank,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(Shared(), main, *arguments),
            timeout=timedelta(minutes=args.rank_timeout),
        )
    except (ProcessExitedException, ProcessRaisedException) as error:
        raise RankError(_describe(error, args)) from error


def _run_rank(locks: Shared, main: Callable[..., Any], *arguments: Any) -> None:
    """One of the processes, or the only one.

    torch sends SIGINT to ranks whose parent died. Where a shell started the run in the background,
    they would ignore it and train on for ever.
    """
    if mp.parent_process() is None:
        main(*arguments)
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(*arguments)
    except RuntimeError as error:
        if _LOST_PEER.search(str(error)):
            time.sleep(_GRACE)  # the launcher shall name the one that died, and ends this one then
        raise


def _describe(error: ProcessExitedException | ProcessRaisedException, args: Any) -> str:
    rank = args.machine_rank * args.num_gpus + error.error_index
    who = f"rank {rank} of {args.num_gpus * args.num_machines} (process {error.error_pid})"
    signal = getattr(error, "signal_name", None)
    if signal:
        hint = (
            ", which often means that the system ran out of memory" if signal == "SIGKILL" else ""
        )
        how = f"was killed by {signal}{hint}"
    elif isinstance(error, ProcessExitedException):
        how = f"ended with exit code {error.exit_code}"
    else:
        how = f"failed: {_message(error.msg)}"
    return f"{who} {how}. The others were stopped; --resume goes on from the last checkpoint"


def _message(trace: str) -> str:
    """The last error of a traceback with all lines of its text; the stack's are indented."""
    last = trace.rpartition("Traceback (most recent call last):\n")[2].strip("\n").splitlines()
    start = next((i for i, line in enumerate(last) if not line.startswith(" ")), 0)
    return "\n".join(last[start:]).rstrip(".")
