"""The processes that torchrun or srun has started: they meet, agree that they are about to do the
same, form torch's process group, and end together.

They meet at a key-value store of torch. The agent of torchrun may keep one store through all
restarts, so what is left there of an earlier attempt is told from this one's by a key of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import uuid
from datetime import timedelta
from typing import Any, Iterator

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fpn_plugin.engine.agreement import Report, find_difference, gpu_index
from fpn_plugin.engine.heartbeat import heartbeat
from fpn_plugin.engine.place import Place, refuse_launch_flags
from fpn_plugin.report.mistakes import mistake_of

_POLL = 0.1  # seconds between two looks at the store
_GRACE = 5.0  # seconds for the process that failed first to say so
_PRECEDENCE = 1.0  # seconds for what another one says to come first
_HELLO, _WELCOME, _HERE = "fpn_plugin/hello", "fpn_plugin/welcome", "here"
_REPORT, _ASKED, _CLOCK, _AGREED = "report", "asked", "clock", "agreed"
_FAILURE, _HEARD = "failure", "heard"
_MISTAKE, _UNEXPECTED, _INTERRUPTED = 2, 1, 130  # exit codes, as the command line has them


class PeerFailure(RuntimeError):
    """Another process has failed, and says why."""


class Peers:
    """This process among the others, from when they have met.

    Attributes:
        place: of this process.
        store: of this attempt alone; a key there is seen by all.
        timeout: how long one waits for another.
    """

    def __init__(self, place: Place, store: dist.Store, timeout: timedelta) -> None:
        self.place, self.store, self.timeout = place, store, timeout
        self._watch = contextlib.ExitStack()

    def join(self, device: str, settings: dict[str, Any]) -> None:
        """Compare what the processes are about to do, and form torch's process group and
        Detectron2's group of each host.

        Args:
            device: of the model: "cuda" (the process's own GPU) or "cpu".
            settings: the config's values by their full keys, without those that may differ between
                hosts.

        Raises:
            ValueError: in rank 0, naming the first host that differs.
            PeerFailure: if another process has failed.
        """
        report = Report.of_this_process(self.place, device, settings)
        self._agree(report)
        is_cuda = torch.device(device).type == "cuda"
        if is_cuda:
            torch.cuda.set_device(gpu_index(self.place))
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=self.store,
            rank=self.place.rank,
            world_size=self.place.processes,
            timeout=self.timeout,
        )
        comm.create_local_process_group(self.place.local_processes)
        comm.synchronize()
        self._watch.enter_context(heartbeat(self.place.address))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let the heartbeat, which begins when the processes have joined, end with the body."""
        with self._watch:
            yield

    def leave(self) -> None:
        """Wait for the others, and leave the process group, if there is one."""
        if dist.is_initialized():
            comm.synchronize()
            dist.destroy_process_group()

    def fail(self, error: Exception) -> int:
        """Tell the others that this process failed, unless another one has failed before.

        Returns:
            0 if this one was the first, which shall say why, else the exit code of the first.
        """
        mine = {"rank": self.place.rank, "code": _MISTAKE if mistake_of(error) else _UNEXPECTED}
        with contextlib.suppress(RuntimeError):  # the store may be gone, with rank 0
            if self.place.rank > 0 or _is_echo(error):
                # rank 0 may be about to say the same, and a lost peer why it went
                patience = _GRACE if _is_echo(error) else _PRECEDENCE
                self._wait(_FAILURE, time.monotonic() + patience)
            first = json.loads(self.store.compare_set(_FAILURE, "", json.dumps(mine)))
            if first != mine:
                self.store.add(_HEARD, 1)
                time.sleep(_PRECEDENCE)  # the launcher stops all when one ends: let it speak
                return int(first["code"])
            self._linger()
        return 0

    def _agree(self, report: Report) -> None:
        rank = self.place.rank
        if rank > 0:
            self.store.set(f"{_REPORT}/{rank}", report.dump())
            # all read their clocks when rank 0 asks for it, which is of about the same moment
            self._await(_ASKED, 0)
            self.store.set(f"{_CLOCK}/{rank}", repr(time.time()))
            self._await(_AGREED, 0)
            return
        others = range(1, self.place.processes)
        reports = [Report.load(self._await(f"{_REPORT}/{other}", other)) for other in others]
        before = time.time()
        self.store.set(_ASKED, "")
        clocks = [(float(self._await(f"{_CLOCK}/{other}", other)), time.time()) for other in others]
        reports = [r.with_clock(clock, before, now) for r, (clock, now) in zip(reports, clocks)]
        if difference := find_difference([report, *reports]):
            raise ValueError(difference)
        self.store.set(_AGREED, "")

    def _await(self, key: str, rank: int) -> bytes:
        """The value of a key that a rank sets, once it is there.

        Raises:
            PeerFailure: if a process has failed.
            ValueError: if it does not come in time.
        """
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not self.store.check([key]):
            if self.store.check([_FAILURE]):
                raise PeerFailure("another process has failed")
            if time.monotonic() > deadline:
                minutes = self.timeout.total_seconds() / 60
                raise ValueError(f"--rank-timeout: rank {rank} was silent for {minutes:g} minutes")
            time.sleep(_POLL)
        return bytes(self.store.get(key))

    def _wait(self, key: str, deadline: float) -> None:
        while not self.store.check([key]) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _linger(self) -> None:
        """Where this process serves the store, give the others time to read there."""
        deadline = time.monotonic() + _GRACE
        others = self.place.processes - 1
        while self.place.rank == 0 and time.monotonic() < deadline:
            if self.store.add(_HEARD, 0) >= others:
                return
            time.sleep(_POLL)


@contextlib.contextmanager
def meet(place: Place | None, args: Any) -> Iterator[Peers | None]:
    """Meet the other processes, and end with them: of an error that is everyone's, or that one has
    and the others only notice, one process speaks, and the others exit with its code.

    Args:
        place: of this process; None without a launcher.
        args: of `fpn_plugin.engine.setup.argument_parser`.

    Yields:
        the processes, which have not formed a group yet (:meth:`Peers.join`); None without a
        launcher.
    """
    if place is None:
        yield None
        return
    timeout = timedelta(minutes=args.rank_timeout)
    store = _connect(place, timeout)
    if place.rank > 0:  # else Python would print the warnings of each
        logging.getLogger("fpn_plugin").addHandler(logging.NullHandler())
    peers = Peers(place, _of_this_attempt(place, store, timeout), timeout)
    try:
        refuse_launch_flags(place, args)
        with peers.watched():
            yield peers
            comm.synchronize()
        peers.leave()
    except KeyboardInterrupt:
        if place.rank == 0:
            raise
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if code := peers.fail(error):
            sys.exit(code)
        mistake, trace = mistake_of(error), error.__traceback__
        if mistake:
            error.mistake = f"{mistake} ({place})"  # type: ignore[attr-defined]
        error.__traceback__ = None if mistake else trace
        get_error_handler().record_exception(error)  # for the summary of torchrun
        raise error.with_traceback(trace)


def peers_of(args: Any) -> Peers | None:
    """The processes that the command line has met; None without a launcher."""
    return getattr(args, "peers", None)


def rank_of(args: Any) -> int:
    """The rank among the processes that the command line has met; 0 without a launcher."""
    peers = peers_of(args)
    return peers.place.rank if peers else 0


def _connect(place: Place, timeout: timedelta) -> dist.Store:
    """The store at which the processes meet; rank 0 serves it, or the agent of torchrun.

    Raises:
        ValueError: naming the address.
    """
    url = f"tcp://{place.address}:{place.port}"
    try:
        return next(dist.rendezvous(url, place.rank, place.processes, timeout=timeout))[0]
    except RuntimeError as error:  # torch's errors of the network are such
        raise ValueError(
            f"MASTER_ADDR {place.address}, MASTER_PORT {place.port}: {place} cannot meet the others"
            f" there ({str(error).splitlines()[0]}): it is a port of the host of rank 0, which the"
            " other hosts must reach, and which no other run may use"
        ) from error


def _of_this_attempt(place: Place, store: dist.Store, timeout: timedelta) -> dist.Store:
    """The store without what an earlier attempt has left there.

    Each process writes a word of its own, and rank 0 answers with all words and a new name for the
    attempt. A process whose word is not among them has been answered for an earlier one.

    Raises:
        ValueError: if processes are missing for too long.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word, name = uuid.uuid4().hex, ""
    store.set(f"{_HELLO}/{place.rank}", word)
    hellos = [f"{_HELLO}/{rank}" for rank in range(place.processes)]
    words: list[str] = []
    while True:
        if place.rank == 0 and store.check(hellos):
            said = [value.decode() for value in store.multi_get(hellos)]
            if said != words:
                words, name = said, uuid.uuid4().hex
                store.set(_WELCOME, json.dumps([name, words]))
        elif place.rank > 0 and store.check([_WELCOME]):
            name, words = json.loads(store.get(_WELCOME))
            if words[place.rank : place.rank + 1] != [word]:
                name = ""
        if name:
            attempt = dist.PrefixStore(name, store)
            attempt.set(f"{_HERE}/{place.rank}", "")
            if attempt.check([f"{_HERE}/{rank}" for rank in range(place.processes)]):
                return attempt
        if time.monotonic() > deadline:
            raise ValueError(
                f"--rank-timeout: the {place.processes} processes did not all come to"
                f" {place.address}:{place.port} in {timeout.total_seconds() / 60:g} minutes"
            )
        time.sleep(_POLL)


def _is_echo(error: Exception) -> bool:
    """Whether an error may be the noise that another process makes as it ends."""
    return isinstance(error, (PeerFailure, RuntimeError)) and not mistake_of(error)
