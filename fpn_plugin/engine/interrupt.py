"""SIGTERM and SIGUSR1 end a run in order: with a checkpoint and an exit code that says "resume me".

Schedulers send them before they take a machine away (SLURM at a time limit or a preemption,
Kubernetes, spot instances). While a run trains, a signal is noted; the run ends after the iteration
that it is in, all processes together whichever of them was told. At any other time it ends at once,
with the same exit code: what it has is saved.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing as mp
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any, Callable, Iterator

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: the same again, with --resume, goes on
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1
# Seconds in which a signal that comes again is the same one: a scheduler sends it to all processes
# of a job, and a launcher passes it on to those that it has started.
_SAME = 5.0


class Interrupted(SystemExit):
    """A signal has ended the run, which can go on from its checkpoint."""

    def __init__(self) -> None:
        super().__init__(RESUME_ME)


class EvaluationLeft(Exception):
    """An evaluation during training was left, as the run is to end."""


@dataclass
class _State:
    """Of this process.

    Attributes:
        is_listening: whether the handlers are there.
        is_deferring: whether a signal is only noted.
        number: of the first signal; 0 before.
        since: when it came.
    """

    is_listening: bool = False
    is_deferring: bool = False
    number: int = 0
    since: float = 0.0


_state = _State()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within it a signal ends the run as this module says, instead of killing the process.

    Nothing changes in a thread, or where the program has handlers of its own. Once a signal has
    ended the run, others are ignored: the process is about to end.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if _state.is_listening or not is_main or any(map(_is_handled, SIGNALS)):
        yield
        return
    _state.is_listening, _state.number = True, 0
    try:
        with _handlers(_end):
            yield
    except Interrupted:
        for child in mp.active_children():
            if child.daemon:  # workers of loaders: torch would wait 5 seconds for each
                child.terminate()
        _ignore_more()  # srun and torchrun stop the processes that end later than the first
        raise
    finally:
        _state.is_listening = False


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """:func:`listening`, and within it a signal is noted for :class:`InterruptHook`."""
    with listening():
        before, _state.is_deferring = _state.is_deferring, True
        try:
            yield
        finally:
            _state.is_deferring = before


@contextlib.contextmanager
def forwarding() -> Iterator[None]:
    """Within it a signal goes to the processes that this one has started, and waits for."""
    with listening(), _handlers(_forward):
        yield


def has_ended_by_signal(exit_code: int) -> bool:
    """Whether a process that this one has started ended because of a signal for the run.

    Args:
        exit_code: of that process, negative if a signal killed it: it had no handler yet.
    """
    return exit_code == RESUME_ME or 0 < _state.number == -exit_code


@contextlib.contextmanager
def interrupted_when_left() -> Iterator[None]:
    """Within it an evaluation may be left, at a time when nothing is to be saved.

    Raises:
        Interrupted: if it is left.
    """
    try:
        yield
    except EvaluationLeft as error:
        logger.warning("%s. Exit code %d: --resume goes on", error, RESUME_ME)
        raise Interrupted from None


class InterruptHook(HookBase):
    """Ends a run after the iteration in which one of its processes got a signal; the last hook.

    Args:
        save: writes the checkpoint of an iteration, in all processes; not called if it is there.
        period: `SOLVER.CHECKPOINT_PERIOD`.
    """

    def __init__(self, save: Callable[[int], None], period: int) -> None:
        self._save = save
        self._period = period

    def after_step(self) -> None:
        """Called by the trainer after each iteration.

        Raises:
            Interrupted: in all processes, once the checkpoint is written.
        """
        name = _told_name()
        if not name:
            return
        last, end = self.trainer.iter, self.trainer.max_iter
        if (last + 1) % self._period and last + 1 < end:
            self._save(last)
        comm.synchronize()  # a launcher stops the others as soon as one process has ended
        _ignore_more()
        logger.warning(
            "%s: the run ends after iteration %d of %d, which is saved. Exit code %d: the same"
            " command with --resume goes on",
            *(name, last + 1, end, RESUME_ME),
        )
        self.trainer.iter += 1  # as at any end: a writer may have written in this iteration
        raise Interrupted


class InterruptibleLoader:
    """A loader for evaluations, which ends early if a process of the run got a signal.

    Args:
        loader: of this process's share of the images.

    Raises:
        EvaluationLeft: in all processes, while training; each iterates over its loader once.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    @property
    def dataset(self) -> Any:
        """The loader's own."""
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if _state.is_deferring and _state.number:
                break
            yield batch
        if _state.is_deferring and (name := _told_name()):
            raise EvaluationLeft(f"{name}: the evaluation is left; a resumed run makes it again")


def _told_name() -> str:
    """The signal that one of the run's processes got, or ""; all processes call it together."""
    names = comm.all_gather(signal.Signals(_state.number).name if _state.number else "")
    return next((name for name in names if name), "")


def _end(number: int, frame: FrameType | None) -> None:
    """The handler of a process that trains or evaluates."""
    if _is_repeated(number):
        return
    if not _state.is_deferring:
        _tell(number, "the run ends before or after its training")
        raise Interrupted
    _tell(number, "the run ends after this iteration, with a checkpoint; a second one ends it now")


def _forward(number: int, frame: FrameType | None) -> None:
    """The handler of a process that waits for those that it has started."""
    if _state.number == 0:
        _state.number, _state.since = number, time.monotonic()
    for child in mp.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid or 0, number)


def _is_repeated(number: int) -> bool:
    """Note a signal. One that comes later than the first, not with it, ends the process."""
    now = time.monotonic()
    if _state.number == 0:
        _state.number, _state.since = number, now
        return False
    if now - _state.since > _SAME:
        _tell(number, "a second signal: the run ends without another checkpoint")
        os._exit(RESUME_ME)
    return True


def _tell(number: int, text: str) -> None:
    """Say it at once; a log's stream may be in the midst of a line."""
    if comm.is_main_process():
        os.write(2, f"{signal.Signals(number).name}: {text}\n".encode())


def _ignore_more() -> None:
    if _state.is_listening:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _is_handled(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_DFL


@contextlib.contextmanager
def _handlers(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not _state.is_listening:
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _shield_child() -> None:
    """Let a forked child (a worker of a data loader) obey its parent alone.

    The run needs its workers to the end of the iteration, but a scheduler may send the signal to
    all processes of a job. Only a thread that waits for signals is told who has sent one.
    """
    if _state.is_listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while True:
        info = signal.sigwaitinfo(SIGNALS)
        if info.si_pid == parent and info.si_signo == signal.SIGTERM:
            os._exit(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shield_child)
