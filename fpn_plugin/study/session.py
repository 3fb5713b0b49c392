"""One training of a study, from its start to its end, as a process beside this one.

Each has a session in the run's record (study.json): the command, the machine, how it ended and how
long it took. The process that starts it may be the study's, or a job on another machine.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch

from fpn_plugin.checkpoint.checkpointer import write_atomically
from fpn_plugin.checkpoint.run_folder import run_results
from fpn_plugin.compare.runs import RECORD, read_record
from fpn_plugin.report.environment import collect_environment
from fpn_plugin.report.progress import failure_text
from fpn_plugin.study.plan import PlannedRun

# How a session ended. KILLED stands in the record until another end is known.
COMPLETED, FAILED, LOST, STOPPED, KILLED = "done", "failed", "lost", "interrupted", "killed"
RESUME_ME = os.EX_TEMPFAIL  # 75: what a run ends with that a signal has ended, with a checkpoint
_PATIENCE = 10.0  # seconds that a run gets to end by itself when its study is interrupted
# What asks a run to end, which has made no mistake then: it may be started again
_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Ending:
    """How a session of a run ended.

    Attributes:
        how: COMPLETED, FAILED (by an error of its own), LOST (killed), or STOPPED (asked to end).
        text: what went wrong.
    """

    how: str
    text: str = ""


@dataclass(frozen=True)
class Share:
    """What of a machine one run has to itself; all of it by default.

    Attributes:
        threads: that its operators use on the CPU; 0: as many as torch takes.
        cpus: the numbers of the cores that it may run on; (): any.
        gpu: for CUDA_VISIBLE_DEVICES; "": any.
    """

    threads: int = 0
    cpus: tuple[int, ...] = ()
    gpu: str = ""

    def environment(self) -> dict[str, str]:
        values = {"OMP_NUM_THREADS": str(self.threads or ""), "CUDA_VISIBLE_DEVICES": self.gpu}
        return {**os.environ, **{name: value for name, value in values.items() if value}}


@dataclass(frozen=True)
class Task:
    """What has to be known of a run to train it, in whatever process.

    Attributes:
        folder: its OUTPUT_DIR.
        command: without --resume.
        on_gpu: whether it takes a GPU where there is one.
        record: what stands in its record beside the sessions.
    """

    folder: Path
    command: tuple[str, ...]
    on_gpu: bool
    record: Mapping[str, Any]

    @classmethod
    def of(cls, run: PlannedRun, command: Sequence[str]) -> Task:
        """The task of a run that is planned; `command` is what trains a run."""
        record: dict[str, Any] = {"name": run.config.name, "seed": run.seed}
        record["config"] = str(run.config.file)
        record["overrides"] = list(run.config.overrides)
        return cls(run.folder, (*command, *run.arguments()), run.wants_gpu, record)


class Session:
    """Start a run, or resume it if its folder has results.

    Args:
        share: of this machine.
        keep_open: descriptors that the run's process inherits.
        job: the number of the cluster's job that this process is; "" elsewhere.
    """

    def __init__(
        self, task: Task, share: Share = Share(), keep_open: Sequence[int] = (), job: str = ""
    ) -> None:
        resume = ["--resume"] if run_results(str(task.folder)) else []
        self._folder = task.folder
        self._record = _begin_record(task, [*task.command, *resume], share, job)
        self._began, self._asked = time.monotonic(), False
        self._output = tempfile.NamedTemporaryFile()
        # that signal is for the job: SLURM may send it to all processes of one
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        try:
            self._process = subprocess.Popen(
                [*task.command, *resume],
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=share.environment(),
                pass_fds=list(keep_open),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if share.cpus and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self._process.pid, share.cpus)

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def poll(self) -> Ending | None:
        """How the run ended; None while it is at work."""
        code = self._process.poll()
        if code is None:
            return None
        ending = self._ending(code)
        if self._end(ending.how, ending.text):
            # what the run has started, such as workers that load data, ends with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return ending

    def stop(self, patience: float = _PATIENCE) -> None:
        """Let the run write a checkpoint and end, and end it if it does not.

        Args:
            patience: in seconds.
        """
        self.ask_to_stop()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.wait(patience if number == signal.SIGTERM else _PATIENCE)
            if self._process.poll() is None:
                self._signal(number)
        self.wait(_PATIENCE)
        self._end(STOPPED)

    def ask_to_stop(self) -> None:
        """Ask the run to write a checkpoint and end, without waiting for it."""
        if self._process.poll() is None and not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)  # a second one would end it at once

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ending(self, code: int) -> Ending:
        if code == RESUME_ME:
            return Ending(STOPPED, f"it was asked to end (exit code {code})")
        if -code in _REQUESTS:
            return Ending(STOPPED, f"it was ended by {signal.Signals(-code).name}")
        if -code == signal.SIGKILL:
            hint = "which often means that the system ran out of memory"
            return Ending(LOST, f"it was killed by SIGKILL, {hint}")
        if code:
            output = Path(self._output.name).read_text(errors="replace")
            return Ending(FAILED, failure_text(code, output))
        return Ending(COMPLETED)

    def _end(self, how: str, text: str = "") -> bool:
        """Complete the record, once."""
        session = self._record["sessions"][-1]
        if "seconds" in session:
            return False
        session["ended"] = how
        if text:
            session["output"] = text.splitlines()
        session["seconds"] = round(time.monotonic() - self._began, 1)
        sessions = self._record["sessions"]
        self._record["seconds"] = round(sum(past.get("seconds", 0) for past in sessions), 1)
        _write_record(self._folder, self._record)
        self._output.close()
        return True


def recorded_ending(folder: Path, job: str) -> Ending | None:
    """How a session ended that a job has started, by the run's record; None if the last one is not
    of that job."""
    session = (read_record(folder).get("sessions") or [{}])[-1]
    if session.get("job") != job:
        return None
    text = "\n".join(session.get("output", ()))
    how = session["ended"]
    return Ending(how if how in (COMPLETED, FAILED) else LOST, text)


def _begin_record(task: Task, command: list[str], share: Share, job: str) -> dict[str, Any]:
    """The run's record with a session for this start, already written: the run may be killed."""
    machine = collect_environment("cuda" if task.on_gpu and torch.cuda.is_available() else "cpu")
    machine["threads"] = share.threads or machine["threads"]
    session = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "ended": KILLED,
        "machine": machine,
    }
    if job:
        session["job"] = job
    record: dict[str, Any] = {**read_record(task.folder), **task.record}
    record["sessions"] = [*record.get("sessions", []), session]
    _write_record(task.folder, record)
    return record


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / RECORD, lambda file: file.write(text.encode()))
