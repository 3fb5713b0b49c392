"""Runs a study: skips what is done, resumes what was interrupted, and compares the results.

Each run is a process of its own, on this machine or in a job of a cluster. One that was lost
(killed, or its machine gone) is started again.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

from fpn_plugin.checkpoint.checkpointer import list_checkpoints
from fpn_plugin.compare.comparison import compare
from fpn_plugin.compare.runs import read_record
from fpn_plugin.engine.run_folder import METRICS
from fpn_plugin.report.progress import NewLines, RunsProgress, as_time
from fpn_plugin.study.config import REPORT, Study, StudyError
from fpn_plugin.study.launchers import Job, Launcher
from fpn_plugin.study.plan import (
    DONE,
    FINAL,
    INTERRUPTED,
    OTHER,
    PlannedRun,
    check_folders,
)
from fpn_plugin.study.session import FAILED, LOST, STOPPED, Ending

TRAIN = (sys.executable, "-m", "fpn_plugin", "train")
_LOSSES = 3  # how often in a row a run may be lost without having got further


@dataclass
class Outcome:
    """The result of a study.

    Attributes:
        done: the runs that can be compared, in the order of the study.
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
    study: Study, runs: Sequence[PlannedRun], progress: RunsProgress, launcher: Launcher
) -> Outcome:
    """Train the runs that are not done yet, as many at once as the launcher starts.

    Args:
        runs: of :func:`plan_runs`.

    Raises:
        ValueError: before anything starts, if a folder holds a run of another config, another
            study runs there, or the launcher cannot start them.
    """
    check_folders(runs)
    with lock(study.output) as lock_file:
        work = _Work(study, runs, progress, launcher, lock_file)
        launcher.check(work.waiting)
        return work.finish()


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


@dataclass
class _AtWork:
    """A run that is being trained.

    Attributes:
        metrics: the new lines of its metrics.json.
        began: when, by the monotonic clock.
        left: the seconds until its end, once it has said so.
        whole: the seconds that it takes from its start on, by that.
    """

    job: Job
    metrics: NewLines
    began: float
    left: float | None = None
    whole: float | None = None


class _Work:
    """The runs of a study on their way."""

    def __init__(
        self,
        study: Study,
        runs: Sequence[PlannedRun],
        progress: RunsProgress,
        launcher: Launcher,
        lock_file: int,
    ) -> None:
        self._study, self._runs, self._progress = study, list(runs), progress
        self._launcher, self._lock_file = launcher, lock_file
        self.waiting = [run for run in runs if run.state() != DONE]
        self._done = [run for run in runs if run not in self.waiting]
        self._failures: dict[PlannedRun, str] = {}
        self._at_work: dict[PlannedRun, _AtWork] = {}
        # how often each was lost in a row, and how far it had got then
        self._losses: dict[PlannedRun, tuple[int, int]] = {}
        # the seconds that each config is known to take
        self._times = {
            run.config.name: seconds
            for run in self._done
            if (seconds := read_record(run.folder).get("seconds"))
        }

    def finish(self) -> Outcome:
        """Train all, and say how."""
        say, launcher = self._progress.say, self._launcher
        say(f"{len(self._runs)} runs in {self._study.output}, {len(self._done)} of them done")
        if launcher.jobs != 1 and len(self.waiting) > 1:
            self._progress.begin_all(len(self._runs))
        try:
            for run, job in launcher.adopt(self.waiting).items():
                self._at_work[run] = self._announce(run, "at work already")(job)
                self.waiting.remove(run)
            while self.waiting or self._at_work:
                self._start()
                for run, state in list(self._at_work.items()):
                    self._look_at(run, state)
                self._update_all()
                if self._at_work:
                    time.sleep(launcher.pause)
        finally:
            self._progress.end_all()
            launcher.leave([state.job for state in self._at_work.values()])
        failures = {run.title: self._failures[run] for run in self._runs if run in self._failures}
        return Outcome([run for run in self._runs if run in self._done], failures)

    def _title(self, run: PlannedRun) -> str:
        return f"run {self._runs.index(run) + 1} of {len(self._runs)}, {run.title}"

    def _start(self) -> None:
        free = (self._launcher.jobs or len(self._runs)) - len(self._at_work)
        runs = self.waiting[: max(free, 0)]
        states = [self._announce(run) for run in runs]
        jobs = self._launcher.start(runs, [self._lock_file]) if runs else []
        for run, state, job in zip(runs, states, jobs):
            self._at_work[run] = state(job)
            self.waiting.remove(run)
        if jobs and (text := self._launcher.submitted(jobs)):
            self._progress.say(text)

    def _announce(self, run: PlannedRun, how: str = "") -> Callable[[Job], _AtWork]:
        """Show a run that is about to start; its state is complete with its job."""
        title = self._title(run)
        how = how or (f"going on at {run.reached()}" if run.state() == INTERRUPTED else "")
        self._progress.say(f"{title}: {run.max_iterations} iterations{how and f', {how}'}")
        self._progress.begin(title, run.max_iterations)
        metrics, began = NewLines(run.folder / METRICS), time.monotonic()
        return lambda job: _AtWork(job, metrics, began)

    def _look_at(self, run: PlannedRun, state: _AtWork) -> None:
        ending = state.job.poll()  # first, so that the last lines are read too
        for metrics in state.metrics.read_losses():
            state.left = metrics.get("eta_seconds", 0.0)
            state.whole = time.monotonic() - state.began + state.left
            note = f", of the study {as_time(self._remaining())}"
            self._progress.update(self._title(run), metrics, note)
        if ending is not None:
            del self._at_work[run]
            self._progress.end(self._title(run))
            self._end(run, ending)

    def _end(self, run: PlannedRun, ending: Ending) -> None:
        title, say = self._title(run), self._progress.say
        if ending.how in (LOST, STOPPED) and self._may_start_again(run):
            say(f"{title}: lost at {run.reached()}: {ending.text}. Starting it again")
            self.waiting.insert(0, run)
        elif ending.how in (LOST, STOPPED):
            self._failures[run] = (
                f"it was lost {_LOSSES} times without getting further, the last time because"
                f" {ending.text}"
            )
            say(f"{title}: FAILED, {self._failures[run]}")
        elif ending.how == FAILED:
            self._failures[run] = ending.text
            say(f"{title}: FAILED, its log is {run.folder}/log.txt")
        elif run.state() != DONE:
            self._failures[run] = (
                f"it ended without a final checkpoint or an evaluation: {run.folder}"
            )
        else:
            self._done.append(run)
            seconds = read_record(run.folder).get("seconds", 0.0)
            self._times[run.config.name] = seconds
            say(f"{title}: done in {as_time(seconds)}")
            if not self._study.keep_checkpoints:
                _remove_earlier_checkpoints(run)

    def _may_start_again(self, run: PlannedRun) -> bool:
        count, before = self._losses.get(run, (0, 0))
        reached = run.reached()
        self._losses[run] = (1 if reached > before else count + 1, reached)
        return self._losses[run][0] < _LOSSES

    def _update_all(self) -> None:
        texts = [f"{len(self._at_work)} at work", self._launcher.notice()]
        texts += [f"ETA {as_time(left)}"] if (left := self._remaining()) else []
        self._progress.update_all(len(self._done), ", ".join(filter(None, texts)))

    def _remaining(self) -> float:
        """The seconds until the end of the study; 0.0 as long as nothing is known."""
        at_work, now = self._at_work.items(), time.monotonic()
        times = {run.config.name: state.whole for run, state in at_work if state.whole}
        times |= self._times
        left = [
            max(_expected(run, times) - now + state.began, 0) if state.left is None else state.left
            for run, state in at_work
        ]
        waiting = [_expected(run, times) for run in self.waiting]
        return remaining_time(left, waiting, self._launcher.jobs or len(self._runs))


def _expected(run: PlannedRun, times: Mapping[str, float]) -> float:
    """The seconds of a run: a config takes as long as with another seed; one that has not run yet,
    as long as the mean."""
    return times.get(run.config.name, statistics.mean(times.values()) if times else 0.0)


def remaining_time(left: Sequence[float], waiting: Sequence[float], slots: int) -> float:
    """The seconds until all runs are done.

    Args:
        left: the seconds that are left of each run that is at work.
        waiting: the seconds of those that follow, in their order.
        slots: how many are at work at once.
    """
    ends = sorted(left)
    for seconds in waiting:
        start = heapq.heappop(ends) if len(ends) >= slots else 0.0
        heapq.heappush(ends, start + seconds)
    return max(ends, default=0.0)


def _remove_earlier_checkpoints(run: PlannedRun) -> None:
    for file in list_checkpoints(str(run.folder)):
        if file.name != FINAL:
            file.unlink()
