"""One run of a study, in a process of its own, with a record of what it ran on."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Callable, Iterator

from fpn_plugin.analysis.progress import watch
from fpn_plugin.analysis.report.environment import collect_environment
from fpn_plugin.analysis.study.record import read_record, write_record
from fpn_plugin.analysis.study.runs import FINAL, PENDING, Run
from fpn_plugin.analysis.study.study_file import StudyError
from fpn_plugin.engine.checkpoint import list_checkpoints

_PATIENCE = 10.0  # seconds that an interrupted run gets to end by itself


@contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Have a study's folder for oneself, as long as this process or one that it started lives.

    Returns:
        a descriptor for the processes that it starts: with it they keep the lock, so that a run
        whose study was killed is not started again beside itself.

    Raises:
        ValueError: if another has it.
    """
    import fcntl  # where there is none there is no study, but the rest of the package

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "study.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(
                f"{folder}: another study, or a run that a killed one left, is at work there"
            ) from error
        yield file.fileno()


def train(run: Run, script: Path, see: Callable[[str], None], held: int) -> float:
    """Start a run, or go on with it, and wait for its end.

    Args:
        script: tools/train_net.py.
        see: gets the lines of its output.
        held: of :func:`lock`.

    Returns:
        the seconds it took, all its starts together.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    flags = [] if run.state() == PENDING else ["--resume"]
    command = [sys.executable, str(script), *flags, *run.arguments()]
    record = _open_record(run, command)
    start, session = time.monotonic(), record["sessions"][-1]
    try:
        with _child(command, held) as process:
            watch(process, see)
        session["ended"] = "done"
    except RuntimeError as error:
        session["ended"], session["output"] = "failed", str(error).splitlines()
        raise
    except BaseException:
        session["ended"] = "interrupted"
        raise
    finally:
        session["seconds"] = round(time.monotonic() - start, 1)
        record["seconds"] = round(sum(one.get("seconds", 0) for one in record["sessions"]), 1)
        write_record(run.folder, record)
    return record["seconds"]


def remove_earlier_checkpoints(run: Run) -> None:
    """Keep the last one only."""
    for file in list_checkpoints(str(run.folder)):
        if file.name != FINAL:
            file.unlink()


def _open_record(run: Run, command: list[str]) -> dict[str, Any]:
    """The record with a session for this start, written already: it may be killed."""
    record = read_record(run.folder)
    session = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "ended": "killed",  # until it says otherwise
        "machine": collect_environment(
            "cuda" if run.cfg.MODEL.DEVICE.startswith("cuda") else "cpu"
        ),
    }
    record |= {"name": run.entry.name, "seed": run.seed, "config": str(run.entry.config)}
    record |= {"overrides": list(run.entry.overrides)}
    record["sessions"] = [*record.get("sessions", []), session]
    write_record(run.folder, record)
    return record


@contextmanager
def _child(command: list[str], held: int) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which does not outlive this block."""
    pipes: dict[str, int | IO[str]] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        command, text=True, start_new_session=True, pass_fds=[held], **pipes  # type: ignore
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            _stop(process)
        if process.stdout is not None:
            process.stdout.close()


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_PATIENCE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
