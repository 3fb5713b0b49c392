"""The runs of a study as jobs of SLURM, one job each, through submitit.

A job is a process of submitit that trains its run in a process of its own and writes the record of
the run, as a study on one machine does. 90 seconds before its time is over, or when it is preempted
with that signal (SIGUSR2), it lets the run write a checkpoint and puts itself into the queue again.
The study looks at the files that the jobs write, and at the queue; it may be interrupted meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Mapping, Sequence

from fpn_plugin.checkpoint.checkpointer import write_atomically
from fpn_plugin.study.config import StudyError
from fpn_plugin.study.launchers import Job
from fpn_plugin.study.plan import PlannedRun
from fpn_plugin.study.session import (
    LOST,
    STOPPED,
    Ending,
    Session,
    Share,
    Task,
    recorded_ending,
)

FOLDER = ".jobs"  # of a study's output: what submitit writes, and which job each run has
_JOBS = "jobs.json"
_MINUTES = 60  # of a job's time, unless --slurm-time says otherwise
_SHORTEST = 5  # minutes
_TIMEOUTS = 1000  # how often a job may run out of time: its run goes on each time
_PATIENCE = 60.0  # seconds, of the 90 that submitit gives a job, for a run to write a checkpoint
_PAUSE = 60.0  # seconds until a run goes on that was asked to end, if the job lives on
_LOOK = 10.0  # seconds between two looks at the queue
_MISSING = 20.0  # seconds that a job is missing in the queue without a result, until it is lost
# What a study sets, and what would not be one process of one run
_OURS = {
    "array": "--jobs says how many runs are at work at once",
    "ntasks": "a run is one process",
    "ntasks-per-node": "a run is one process",
    "nodes": "a run is one process",
    "output": "the log is in OUTPUT/.jobs",
    "error": "the log is in OUTPUT/.jobs",
    "open-mode": "the log is in OUTPUT/.jobs",
    "signal": "it is submitit's to set",
    "wrap": "it is submitit's to set",
}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")  # of sbatch: [days-]…


def check_options(options: Mapping[str, str | bool]) -> None:
    """Refuse options of sbatch that are the study's to set.

    Raises:
        ValueError: naming the option.
    """
    for name in options:
        if name in _OURS:
            raise StudyError(f"--slurm-{name} cannot be given: {_OURS[name]}")


def minutes(text: str) -> int:
    """A time as sbatch takes it (minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds) in whole minutes.

    Raises:
        ValueError: for anything else, and for a time that is too short.
    """
    match = _TIME.fullmatch(text)
    if not match:
        raise StudyError(f"--slurm-time: {text!r} is no time such as 240 (minutes) or 1-12:00:00")
    days, *numbers = [None if part is None else int(part) for part in match.groups()]
    a, b, c = (number or 0 for number in numbers)
    if days is not None or numbers[2] is not None:
        seconds = (days or 0) * 86400 + a * 3600 + b * 60 + c
    else:
        seconds = a * 60 + b
    if seconds < _SHORTEST * 60:
        raise StudyError(
            f"--slurm-time: {text!r} is less than {_SHORTEST} minutes: a job is asked to end 90"
            " seconds before its time is over, and has to have started its run by then"
        )
    return seconds // 60


class TrainingJob:
    """What a job of the cluster does: train a run to its end.

    submitit pickles it, and calls `checkpoint` when the job has to leave its machine.
    """

    def __init__(self, task: Task, threads: int) -> None:
        self._task = task
        self._threads = threads
        self._session: Session | None = None

    def __call__(self) -> None:
        """Train until the run is done, has failed or was killed; its record says which.

        A run that somebody else than this job has asked to end goes on after a while. SLURM asks so
        before it removes a job, and may put it into the queue again by itself: such a job must not
        have a result, or its run would be started twice.
        """
        while True:
            self._session = Session(
                self._task, Share(self._threads), job=_submitit().JobEnvironment().job_id
            )
            while (ending := self._session.poll()) is None:
                self._session.wait(1.0)
            if ending.how != STOPPED:
                return
            time.sleep(_PAUSE)

    def checkpoint(self) -> Any:
        """Let the run write a checkpoint and end; the job in the queue goes on with it."""
        if self._session is not None:
            self._session.stop(_PATIENCE)
        return _submitit().helpers.DelayedSubmission(TrainingJob(self._task, self._threads))


class ClusterJob:
    """A run in a job of the cluster.

    Args:
        job: submitit's.
        queue: None where jobs are processes of this machine (submitit's "local").
    """

    def __init__(self, job: Any, folder: Path, queue: Queue | None) -> None:
        self._job, self._folder, self._queue = job, folder, queue
        self._missing_since: float | None = None

    @property
    def number(self) -> str:
        return str(self._job.job_id)

    def poll(self) -> Ending | None:
        if not self.is_over():
            return None
        ending = recorded_ending(self._folder, self.number)
        if ending is not None and (ending.how != LOST or ending.text):
            return ending
        return Ending(
            LOST,
            f"job {self.number} ended without a result (cancelled, out of time or memory, or its"
            f" machine is gone), its log is {self._job.paths.stderr}",
        )

    def is_over(self) -> bool:
        """Whether the job has written its result, or is gone without one."""
        if self._job.paths.result_pickle.exists():
            return True
        if self._queue is None:
            return bool(self._job.done())
        if self._queue.state(self.number) != "":
            self._missing_since = None
            return False
        # a network's file system may show the result later than the queue the end
        self._missing_since = self._missing_since or time.monotonic()
        return time.monotonic() - self._missing_since > _MISSING


class Queue:
    """The jobs of this user that wait or run, by squeue.

    `sacct`, which submitit asks, needs a data base that not every cluster has.
    """

    def __init__(self) -> None:
        self._states: dict[str, str] | None = None
        self._looked = float("-inf")

    def state(self, number: str) -> str | None:
        """The state of a job, such as "RUNNING" or "PENDING (Resources)"; "" for one that is not in
        the queue, None where the queue cannot be seen."""
        states = self.states()
        return None if states is None else states.get(number, "")

    def states(self) -> dict[str, str] | None:
        if time.monotonic() - self._looked > _LOOK:
            command = ["squeue", "--me", "--array", "--noheader", "--format", "%i|%T|%r"]
            done = subprocess.run(command, capture_output=True, text=True)
            self._states = _read_queue(done.stdout) if done.returncode == 0 else None
            self._looked = time.monotonic()
        return self._states

    def forget(self) -> None:
        """Look again at the next question."""
        self._looked = float("-inf")


class ClusterLauncher:
    """Trains runs in jobs of SLURM, those that start together in one array.

    Args:
        output: the study's.
        command: what trains a run.
        jobs: how many jobs of an array run at once; 0: as many as the cluster lets.
        cores: of each job; 0: the cluster's default.
        options: of sbatch, by name; True for one without a value. `setup` is a line of shell that
            precedes the job.
        cluster: "slurm", or "local" for processes of submitit on this machine, for tests.

    Raises:
        ImportError: without submitit.
        ValueError: where there is no sbatch.
    """

    pause = 2.0

    def __init__(
        self,
        output: Path,
        command: Sequence[str],
        jobs: int = 0,
        cores: int = 0,
        options: Mapping[str, str | bool] | None = None,
        cluster: str = "slurm",
    ) -> None:
        check_options(options or {})
        self.jobs = 0  # all are put into the queue, which holds back what is too much
        self._command, self._at_once, self._cores = command, jobs, cores
        self._options = dict(options or {})
        self._minutes = minutes(str(self._options.pop("time", _MINUTES)))
        setup = self._options.pop("setup", None)
        self._setup = [str(setup)] if setup else None
        self._folder, self._cluster = output / FOLDER, cluster
        self._submitit = _submitit()
        if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("squeue")):
            raise StudyError(
                "--launcher slurm: there is no sbatch here: give the command on a machine of the"
                " cluster from which jobs are submitted"
            )
        self._queue = Queue() if cluster == "slurm" else None
        self._numbers: dict[str, str] = {}

    @property
    def farewell(self) -> str:
        arrays = sorted({number.partition("_")[0] for number in self._numbers.values()})
        return (
            "Interrupted; its jobs go on. Run it again to follow them; this ends them: scancel "
            + " ".join(arrays)
        )

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """The cluster says what it cannot run when the jobs are submitted."""

    def adopt(self, runs: Sequence[PlannedRun]) -> Mapping[PlannedRun, Job]:
        numbers = self._read_numbers()
        if self._queue is None or not numbers:
            return {}  # processes of submitit are known only to the process that has started them
        queued = self._queue.states()
        if queued is None:
            raise StudyError("--launcher slurm: squeue fails: which jobs are at work is unknown")
        self._numbers = {key: number for key, number in numbers.items() if number in queued}
        return {
            run: self._job(self._submitit.SlurmJob(self._folder, self._numbers[_key(run)]), run)
            for run in runs
            if _key(run) in self._numbers
        }

    def start(self, runs: Sequence[PlannedRun], keep_open: Sequence[int]) -> Sequence[Job]:
        executor = self._executor(any(run.wants_gpu for run in runs))
        # a study that is itself a job does not hand its own settings on
        inside = self._submitit.helpers.clean_env if "SLURM_JOB_ID" in os.environ else nullcontext
        try:
            with inside(), executor.batch():
                submitted = [
                    executor.submit(TrainingJob(Task.of(run, self._command), self._cores))
                    for run in runs
                ]
        except self._submitit.core.utils.FailedJobError as error:
            raise StudyError(f"--launcher slurm: {_refusal(error)}") from error
        jobs = [self._job(job, run) for run, job in zip(runs, submitted)]
        self._numbers |= {_key(run): job.number for run, job in zip(runs, jobs)}
        text = json.dumps(self._numbers, indent=1) + "\n"
        write_atomically(self._folder / _JOBS, lambda file: file.write(text.encode()))
        if self._queue is not None:
            self._queue.forget()
        return jobs

    def leave(self, jobs: Sequence[Job]) -> None:
        """The jobs go on without the study."""

    def submitted(self, jobs: Sequence[Job]) -> str:
        numbers = [job.number for job in jobs if isinstance(job, ClusterJob)]
        some = numbers if len(numbers) < 3 else [numbers[0], "…", numbers[-1]]
        return f"submitted as {' '.join(some)}; the logs of the jobs are in {self._folder}"

    def notice(self) -> str:
        """Of the jobs that wait, with the cluster's reasons."""
        states = (self._queue.states() if self._queue is not None else None) or {}
        ours = [states.get(number, "") for number in self._numbers.values()]
        waiting = [state for state in ours if state.startswith("PENDING")]
        reasons = sorted({state.removeprefix("PENDING").strip(" ()") for state in waiting})
        return f"{len(waiting)} of them in the queue ({', '.join(reasons)})" if waiting else ""

    def _executor(self, on_gpu: bool) -> Any:
        """submitit's, with the options."""
        executor = self._submitit.AutoExecutor(
            self._folder, cluster=self._cluster, slurm_max_num_timeout=_TIMEOUTS
        )
        options: dict[str, Any] = {"job_name": f"study-{self._folder.resolve().parent.name}"}
        if on_gpu and not any(re.match("gpus|gres", name) for name in self._options):
            options["gpus_per_node"] = 1
        options |= {name.replace("-", "_"): value for name, value in self._options.items()}
        cores = options.get("cpus_per_task", self._cores)
        if cores:
            options["cpus_per_task"] = cores
        executor.update_parameters(
            timeout_min=self._minutes,
            slurm_array_parallelism=self._at_once or 1000,
            # srun does not take it from sbatch
            slurm_srun_args=[f"--cpus-per-task={cores}"] if cores else None,
            slurm_setup=self._setup,
            slurm_additional_parameters=options,
        )
        return executor

    def _job(self, job: Any, run: PlannedRun) -> ClusterJob:
        return ClusterJob(job, run.folder, self._queue)

    def _read_numbers(self) -> dict[str, str]:
        """Which job each run has had last, by the runs' folders."""
        path = self._folder / _JOBS
        try:
            numbers = json.loads(path.read_text()) if path.is_file() else {}
            return {str(key): str(number) for key, number in numbers.items()}
        except (ValueError, AttributeError) as error:
            raise StudyError(f"{path}: {error}: remove it, if no job is at work") from error


def _key(run: PlannedRun) -> str:
    return f"{run.config.name}/seed-{run.seed}"


def _read_queue(text: str) -> dict[str, str]:
    """Lines as "12_0|PENDING|Resources" by job: "PENDING (Resources)"."""
    states = {}
    for line in text.splitlines():
        number, state, reason = (*line.strip().split("|", 2), "", "")[:3]
        states[number] = state if reason in ("", "None") else f"{state} ({reason})"
    return states


def _refusal(error: Exception) -> str:
    """What sbatch has said."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line.startswith("sbatch: ")]
    return "; ".join(said or lines[-1:])


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "--launcher slurm needs submitit: pip install 'fpn_plugin[slurm]'"
        ) from error
    return submitit
