"""Launches the processes of a run, and reports which of them died and how."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
import signal
from datetime import timedelta
from typing import Any, Callable
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT, launch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fpn_plugin.engine.folder_lock import SharedLocks
from fpn_plugin.engine.heartbeat import heartbeat
from fpn_plugin.engine.interrupt import Interrupted, forwarding, has_ended_by_signal, listening
from fpn_plugin.engine.rendezvous import announced
from fpn_plugin.plugins import Loaded
from fpn_plugin.report.mistakes import mistake_in


class RankError(RuntimeError):
    """One of the processes of a run failed, and the others of this machine were stopped.

    Attributes:
        mistake: the message of the user's mistake, or of the signal that killed the process; ""
            for an unexpected error, whose traceback is that of the cause.
    """

    mistake = ""


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


def launch_ranks(
    main: Callable[..., Any], args: Any, arguments: tuple[Any, ...], device: str
) -> None:
    """Detectron2's `launch`; a single process, and one that another launcher has started and that
    has joined the others, calls `main` without starting another.

    Args:
        main: runs in each process.
        args: of `fpn_plugin.engine.setup.argument_parser`; `rank_timeout` is in minutes.
        arguments: the arguments of `main`.
        device: of the model.

    Raises:
        RankError: if one of several processes was killed or raised an error.
        Interrupted: if a signal has ended them.
    """
    if dist.is_initialized():
        main(*arguments)
        return
    processes = args.num_gpus * args.num_machines
    if device == "cpu" and processes > 1:
        # Detectron2 takes NCCL where a process sees a GPU, and gloo where it sees none
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with forwarding() if processes > 1 else contextlib.nullcontext():
            launch(
                _run_rank,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=announced(args.dist_url, args.machine_rank * args.num_gpus, device),
                # in the order of their unpickling
                args=(Loaded(), SharedLocks(), _first_machine(args.dist_url), main, *arguments),
                timeout=timedelta(minutes=args.rank_timeout),
            )
    except (ProcessExitedException, ProcessRaisedException) as error:
        if has_ended_by_signal(getattr(error, "exit_code", 0)):
            raise Interrupted from None
        failure = RankError(_describe(error, args))
        failure.mistake = mistake_in(getattr(error, "msg", ""))
        if isinstance(error, ProcessExitedException):  # by a signal, or its heartbeat said why
            failure.mistake = str(failure)
        raise failure from error


def check_processes(args: Any, device: str) -> None:
    """Check the flags that say how many processes run where.

    Raises:
        ValueError: naming the flag.
    """
    gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
    if gpus and args.num_gpus > gpus:
        raise ValueError(
            f"--num-gpus {args.num_gpus}: this machine has {gpus}, as far as CUDA_VISIBLE_DEVICES"
            " lets them be seen"
        )
    if not 0 <= args.machine_rank < max(1, args.num_machines):
        raise ValueError(
            f"--machine-rank {args.machine_rank}: machines count from 0 to --num-machines - 1,"
            f" {args.num_machines - 1}"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            "--dist-url auto: several machines need one address, such as tcp://10.0.0.1:29500, a"
            " port of the machine of --machine-rank 0"
        )


def _first_machine(dist_url: str) -> str:
    """The address of the machine of rank 0, as the others reach it."""
    is_here = dist_url == "auto" or dist_url.startswith("file:")
    return "127.0.0.1" if is_here else urlsplit(dist_url).hostname or ""


def _run_rank(
    loaded: Loaded, locks: SharedLocks, address: str, main: Callable[..., Any], *arguments: Any
) -> None:
    """Run `main` in one of the processes, or in the only one.

    torch sends SIGINT to ranks whose parent died. A shell has background jobs ignore that signal,
    so without a handler such ranks would never stop. Their data workers are forked, as those of a
    process that torchrun starts: they import nothing again, and no signal kills them meanwhile.
    """
    if mp.parent_process() is None:
        main(*arguments)
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "fork" in mp.get_all_start_methods():
        mp.set_start_method("fork", force=True)
    with listening(), heartbeat(address):
        main(*arguments)


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
    refused = "ResumeError: " in how
    advice = "" if refused else "; --resume goes on from the last checkpoint"
    return f"{who} {how}. The others were stopped{advice}"


def _message(trace: str) -> str:
    """All lines of the last error's message in a traceback; those of the stack are indented."""
    last = trace.rpartition("Traceback (most recent call last):\n")[2].strip("\n").splitlines()
    start = next((i for i, line in enumerate(last) if not line.startswith(" ")), 0)
    return "\n".join(last[start:]).rstrip(".")
