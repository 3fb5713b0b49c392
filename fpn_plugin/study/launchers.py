"""Where the runs of a study are trained: in processes beside it. cluster.py has jobs of SLURM."""

from __future__ import annotations

import os
from functools import partial
from typing import Callable, Mapping, Protocol, Sequence

import torch

from fpn_plugin.study.config import StudyError
from fpn_plugin.study.plan import PlannedRun
from fpn_plugin.study.session import Ending, Session, Share, Task


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> Ending | None:
        """How it ended; None while it is at work."""


class Launcher(Protocol):
    """Starts runs and knows how they end.

    Attributes:
        jobs: how many runs are started at once; 0: all.
        pause: seconds between two looks at the runs.
    """

    jobs: int
    pause: float

    @property
    def farewell(self) -> str:
        """What to say when the study is interrupted."""

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Refuse, before anything starts, what cannot run.

        Raises:
            ValueError: naming the option.
        """

    def adopt(self, runs: Sequence[PlannedRun]) -> Mapping[PlannedRun, Job]:
        """Those of the runs that are at work already, for a study that was interrupted."""

    def start(self, runs: Sequence[PlannedRun], keep_open: Sequence[int]) -> Sequence[Job]:
        """Start runs, or resume those whose folders have results.

        Args:
            keep_open: descriptors that processes on this machine inherit.
        """

    def leave(self, jobs: Sequence[Job]) -> None:
        """The study is interrupted while these are at work."""

    def submitted(self, jobs: Sequence[Job]) -> str:
        """What to say of jobs that were started, if anything."""

    def notice(self) -> str:
        """What the runs wait for, if they do."""


class LocalJob:
    """A run in a process beside this one."""

    def __init__(self, session: Session, on_end: Callable[[], None]) -> None:
        self.session = session
        self._on_end = on_end

    def poll(self) -> Ending | None:
        ending = self.session.poll()
        if ending is not None:
            self._on_end()
        return ending


class LocalLauncher:
    """Trains runs on this machine, each with a GPU of its own or with cores of its own.

    Args:
        command: what trains a run.
        jobs: how many at once. Of several, each gets a GPU; where there is none, they divide the
            cores.
        cores: how many each gets; 0: all, divided by `jobs` where there is no GPU.
    """

    pause = 0.5
    farewell = "Interrupted; run it again to go on"

    def __init__(self, command: Sequence[str], jobs: int = 1, cores: int = 0) -> None:
        self._command = command
        self.jobs = jobs
        self._cores = cores
        self._free: list[Share] = []

    def check(self, runs: Sequence[PlannedRun]) -> None:
        gpus = any(run.wants_gpu for run in runs) and torch.cuda.is_available()
        if gpus and self.jobs > 1:
            for run in runs:
                if run.cfg.MODEL.DEVICE.startswith("cuda:"):
                    raise StudyError(
                        f"runs.{run.config.name}: MODEL.DEVICE {run.cfg.MODEL.DEVICE!r}: --jobs"
                        f" {self.jobs} gives each run a GPU of its own: say cuda"
                    )
        self._free = shares(self.jobs, self._cores, _visible_gpus() if gpus else [], _cpus())

    def adopt(self, runs: Sequence[PlannedRun]) -> Mapping[PlannedRun, Job]:
        return {}  # what outlives a killed study holds its lock

    def start(self, runs: Sequence[PlannedRun], keep_open: Sequence[int]) -> Sequence[Job]:
        jobs = []
        for run in runs:
            share = self._free.pop(0)
            session = Session(Task.of(run, self._command), share, keep_open)
            jobs.append(LocalJob(session, partial(self._free.append, share)))
        return jobs

    def leave(self, jobs: Sequence[Job]) -> None:
        sessions = [job.session for job in jobs if isinstance(job, LocalJob)]
        for session in sessions:
            session.ask_to_stop()
        for session in sessions:
            session.stop()

    def submitted(self, jobs: Sequence[Job]) -> str:
        return ""

    def notice(self) -> str:
        return ""


def shares(jobs: int, cores: int, gpus: Sequence[str], cpus: Sequence[int]) -> list[Share]:
    """The parts of a machine for runs at the same time.

    Args:
        jobs: how many there are.
        cores: how many each gets; 0: what is said above.
        gpus: as CUDA_VISIBLE_DEVICES names them; none: the runs use the CPU.
        cpus: the numbers of the cores.

    Raises:
        ValueError: if there is not enough of them, naming the option.
    """
    if gpus and jobs > len(gpus):
        raise StudyError(
            f"--jobs {jobs}: each run gets a GPU of its own, and this machine has {len(gpus)}, as"
            " far as CUDA_VISIBLE_DEVICES lets them be seen"
        )
    if cores * jobs > len(cpus):
        raise StudyError(
            f"--jobs {jobs} with --cores {cores} are {jobs * cores} cores, and this machine has"
            f" {len(cpus)}, as far as this process may use them"
        )
    own_gpus = [*gpus[:jobs]] if jobs > 1 else []
    own_gpus += [""] * (jobs - len(own_gpus))
    if cores:
        return [
            Share(cores, tuple(cpus[i * cores : (i + 1) * cores]), gpu)
            for i, gpu in enumerate(own_gpus)
        ]
    divided = jobs > 1 and not gpus and "OMP_NUM_THREADS" not in os.environ
    return [Share(max(1, len(cpus) // jobs) if divided else 0, (), gpu) for gpu in own_gpus]


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name.strip()][: len(numbers)] or numbers


def _cpus() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
