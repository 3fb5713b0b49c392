"""Runs a study: skips what is done, resumes what was interrupted, and compares the results.

Each run is a process of its own, with a record (study.json) of what it ran on and how long.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, Sequence

from fpn_plugin.checkpoint.checkpointer import list_checkpoints, write_atomically
from fpn_plugin.compare.comparison import compare
from fpn_plugin.compare.runs import RECORD, read_record
from fpn_plugin.engine.run_folder import METRICS
from fpn_plugin.report.environment import collect_environment
from fpn_plugin.report.progress import TrainingProgress, as_time, follow
from fpn_plugin.study.config import REPORT, Study, StudyError
from fpn_plugin.study.plan import (
    DONE,
    FINAL,
    INTERRUPTED,
    OTHER,
    PENDING,
    PlannedRun,
    check_folders,
)

TRAIN = (sys.executable, "-m", "fpn_plugin", "train")
_PATIENCE = 10.0  # seconds that an interrupted run gets to end by itself


@dataclass
class Outcome:
    """The result of a study.

    Attributes:
        done: the runs that can be compared.
        failures: by the titles of the runs that failed, the end of their output.
    """

    done: list[PlannedRun] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def quiet_loggers() -> None:
    """Keep what loading a config logs out of the study's output; each run logs it again."""
    for name in ("fpn_plugin", "detectron2", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)


def status_text(runs: Sequence[PlannedRun], command: Sequence[str] = TRAIN) -> str:
    """Each run with its state, its command, and the keys that its folder has otherwise."""
    lines = []
    for run in runs:
        state = run.state()
        if state == INTERRUPTED:
            state = f"{state} at {run.reached()} of {run.max_iterations}"
        lines.append(f"{run.title}: {state}")
        if state == OTHER:
            lines += [f"  {change}" for change in run.changes()]
        elif state != DONE:
            lines.append(f"  {shlex.join([*command, *run.arguments()])}")
    return "\n".join(lines)


def run_study(
    study: Study,
    runs: Sequence[PlannedRun],
    progress: TrainingProgress,
    command: Sequence[str] = TRAIN,
) -> Outcome:
    """Train the runs that are not done yet, one after the other.

    Args:
        runs: of :func:`plan_runs`.
        command: what trains a run.

    Raises:
        ValueError: before anything starts, if a folder holds a run of another config or another
            study runs there.
    """
    check_folders(runs)
    outcome = Outcome()
    with lock(study.output) as lock_file:
        waiting = [run for run in runs if run.state() != DONE]
        finished = [run for run in runs if run not in waiting]
        progress.say(f"{len(runs)} runs in {study.output}, {len(finished)} of them done")
        for number, run in enumerate(runs, 1):
            if run in finished:
                outcome.done.append(run)
                continue
            waiting.remove(run)
            title = f"run {number} of {len(runs)}, {run.title}"
            resumed = f", going on at {run.reached()}" if run.state() == INTERRUPTED else ""
            progress.say(f"{title}: {run.max_iterations} iterations{resumed}")
            remaining = _remaining_time(run, [*finished, *outcome.done], list(waiting))
            progress.begin(title, run.max_iterations)
            try:
                seconds = train(run, command, _shown_by(progress, remaining), lock_file)
            except RuntimeError as error:
                outcome.failures[run.title] = str(error)
                progress.say(f"{title}: FAILED, its log is {run.folder}/log.txt")
                continue
            finally:
                progress.end()
            if run.state() != DONE:
                outcome.failures[run.title] = (
                    f"it ended without a final checkpoint or an evaluation: {run.folder}"
                )
                continue
            outcome.done.append(run)
            progress.say(f"{title}: done in {as_time(seconds)}")
            if not study.keep_checkpoints:
                _remove_earlier_checkpoints(run)
    return outcome


def compare_runs(study: Study, runs: Sequence[PlannedRun], quiet: bool) -> Path:
    """Compare the runs that are done in the study's report; returns its HTML page."""
    # by its folder, as the report may name the config otherwise
    baselines = [str(run.folder) for run in runs if run.config.name == study.baseline]
    return compare(
        [str(run.folder) for run in runs],
        str(study.output / REPORT),
        size_bins=study.size_bins,
        baseline=baselines[0] if baselines else "",
        overwrite=True,
        quiet=quiet,
    )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Lock a study's folder while this process, or one that it started, lives.

    Returns:
        a descriptor that holds the lock. A run inherits it, so that a run that outlives its killed
        study is not started a second time.

    Raises:
        ValueError: if another process holds the lock.
    """
    import fcntl  # absent on Windows, where the rest of the package works

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "study.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(
                f"{folder}: another study, or a run that a killed one left, is at work there"
            ) from error
        yield file.fileno()


def train(
    run: PlannedRun,
    command: Sequence[str],
    on_metrics: Callable[[Mapping[str, Any]], None],
    lock_file: int,
) -> float:
    """Start or resume a run, and wait for its end.

    Args:
        command: what trains a run.
        on_metrics: gets each new line of its metrics.json that has a loss.
        lock_file: of :func:`lock`.

    Returns:
        the seconds it took, all its sessions together.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    flags = [] if run.state() == PENDING else ["--resume"]
    command = [*command, *flags, *run.arguments()]
    record = _begin_session(run, command)
    start, session = time.monotonic(), record["sessions"][-1]
    try:
        with tempfile.NamedTemporaryFile() as output:
            with _process_group(command, output, lock_file) as process:
                follow(process, Path(output.name), run.folder / METRICS, on_metrics)
        session["ended"] = "done"
    except RuntimeError as error:
        session["ended"], session["output"] = "failed", str(error).splitlines()
        raise
    except BaseException:
        session["ended"] = "interrupted"
        raise
    finally:
        session["seconds"] = round(time.monotonic() - start, 1)
        record["seconds"] = round(sum(past.get("seconds", 0) for past in record["sessions"]), 1)
        _write_record(run.folder, record)
    return record["seconds"]


def _shown_by(
    progress: TrainingProgress, remaining: Callable[[float], float]
) -> Callable[[Mapping[str, Any]], None]:
    """Show a run's metrics, with the ETA of the study."""
    start = time.monotonic()

    def show(metrics: Mapping[str, Any]) -> None:
        left = metrics.get("eta_seconds", 0.0)
        whole = time.monotonic() - start + left
        progress.update(metrics, f", of the study {as_time(left + remaining(whole))}")

    return show


def _remaining_time(
    run: PlannedRun, done: Sequence[PlannedRun], waiting: Sequence[PlannedRun]
) -> Callable[[float], float]:
    """A function from the seconds of a run to those of all runs after it.

    A config takes as long as with another seed; one that has not run yet, as long as the mean.
    """
    known = {
        other.config.name: seconds
        for other in done
        if (seconds := read_record(other.folder).get("seconds"))
    }

    def remaining(seconds: float) -> float:
        times = {run.config.name: seconds, **known}
        mean = statistics.mean(times.values())
        return sum(times.get(other.config.name, mean) for other in waiting)

    return remaining


def _remove_earlier_checkpoints(run: PlannedRun) -> None:
    for file in list_checkpoints(str(run.folder)):
        if file.name != FINAL:
            file.unlink()


def _begin_session(run: PlannedRun, command: list[str]) -> dict[str, Any]:
    """The run's record with a session for this start, already written: the run may be killed."""
    session = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "ended": "killed",  # until another end is recorded
        "machine": collect_environment(
            "cuda" if run.cfg.MODEL.DEVICE.startswith("cuda") else "cpu"
        ),
    }
    record = read_record(run.folder)
    record |= {"name": run.config.name, "seed": run.seed, "config": str(run.config.file)}
    record |= {"overrides": list(run.config.overrides)}
    record["sessions"] = [*record.get("sessions", []), session]
    _write_record(run.folder, record)
    return record


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / RECORD, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _process_group(
    command: list[str], output: IO[bytes], lock_file: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with this block."""
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[lock_file],
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(_PATIENCE)
