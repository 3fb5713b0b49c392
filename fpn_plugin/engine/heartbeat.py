"""Notices within half a minute that another process of a run is gone: its host, the link to it, or
the process alone.

Every process holds a connection to that of rank 0, on which nothing is said until the end. The
kernels on both sides keep it alive (TCP's keep-alive), not the processes: one that is slow, or busy
for an hour in a library that lets no other thread run (reading annotations, scoring an evaluation),
is not taken for a lost one. A process that hangs is not noticed here but by `--rank-timeout`.

A thread listens, as the training itself waits in a collective then. It ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.run import get_args_parser

from fpn_plugin.engine.interrupt import RESUME_ME
from fpn_plugin.report.mistakes import PREFIX, mistake_of

# seconds without a sign of life until the kernel asks, between its questions, and how many of these
# stay without an answer: many, so that a link that loses every third packet is no cut one
_IDLE, _INTERVAL, _PROBES = 5, 2, 9
SILENCE = _IDLE + _INTERVAL * _PROBES
_KEEP_ALIVE = {
    "TCP_KEEPIDLE": _IDLE,
    "TCP_KEEPALIVE": _IDLE,  # its name on macOS
    "TCP_KEEPINTVL": _INTERVAL,
    "TCP_KEEPCNT": _PROBES,
    "TCP_USER_TIMEOUT": SILENCE * 1000,  # for what was said and not confirmed
}
_CUT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
_GRACE = 5.0  # seconds for a launcher on this host to notice first which process died
_POLL = 1.0  # seconds between two looks at the launcher
_CONNECT = 10.0  # seconds to reach rank 0
_TOKEN = 16  # bytes
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # only torchrun sets it
_REACH = 3.0  # seconds to reach the store of torchrun's agents
_PATIENCE = 10.0  # seconds for an agent to end by itself, and once more after SIGTERM
# what the errors of gloo, NCCL and the store say when another process is gone
_NETWORK = re.compile(
    r"(?i)connection (closed|reset|was)|closed by peer|remote process|broken pipe|socket"
    r"|timed? ?out|ncclremoteerror|ncclsystemerror"
)


class LostPeerError(RuntimeError):
    """Another process of the run is gone."""


class Peer(NamedTuple):
    """A process of the run.

    Attributes:
        machine: the first rank on its machine.
        host: the machine's name.
        pid: its process.
        address: of the machine, as the connection to rank 0 shows it; "" if there is none.
    """

    rank: int
    machine: int
    host: str
    pid: int
    address: str = ""

    @property
    def place(self) -> str:
        shown = self.address and not self.address.startswith(("127.", "::1"))
        return f"host {self.host}" + (f" ({self.address})" if shown else "")


class _Link:
    """A connection to another process, which speaks in lines of JSON."""

    open: set[socket.socket] = set()

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection, self.rank = connection, rank
        self._rest = b""
        connection.settimeout(_POLL)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.open.add(connection)

    def say(self, **words: Any) -> None:
        """Say something; one that is gone does not hear it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(words).encode() + b"\n")

    def hear(self) -> list[dict[str, Any]] | None:
        """What was said; None at the end of the connection.

        Raises:
            OSError: if it is broken.
        """
        received = self.connection.recv(1 << 16)
        if not received:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.open.discard(self.connection)
        self.connection.close()


class Heartbeat:
    """Listens to the other processes in a thread.

    Args:
        peers: all processes of the run, by rank.
        rank: of this one.
        links: to rank 0, or those of rank 0.
        end: is called in the thread with what to say and the exit code, if a process is lost.
    """

    def __init__(
        self,
        peers: list[Peer],
        rank: int,
        links: list[_Link],
        end: Callable[[str, int], None] | None = None,
    ) -> None:
        self._peers, self._own = peers, peers[rank]
        self._links = {link.rank: link for link in links}
        self._end = end or self._end_process
        self._launcher = os.getppid()
        self._silent: set[int] = set()
        self._losses: list[str] = []  # of other kinds than silence
        self._lost: set[int] = set()
        self._code = RESUME_ME
        self._noticed, self._closing = threading.Event(), threading.Event()
        self._wake, self._alarm = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        for link in links:
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._listen, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, failure: str = "", code: int = 1) -> None:
        """Part from the others, who end too if this process has failed.

        Args:
            failure: how; "" at an orderly end.
            code: what it exits with then.
        """
        self._closing.set()
        self._alarm.send(b"!")
        self._thread.join()
        for link in self._links.values():
            link.say(**({"failed": failure, "code": code} if failure else {"done": True}))
            link.close()
        self._selector.close()
        self._wake.close()
        self._alarm.close()

    def await_end(self, seconds: float) -> None:
        """Let the thread end the process, if it has noticed a loss or does so in some seconds."""
        if self._noticed.wait(seconds):
            self._thread.join()

    def _listen(self) -> None:
        end = float("inf")
        while time.monotonic() < end:
            for key, _ in self._selector.select(_POLL):
                if key.data is None:
                    return
                self._hear(key.data)
            if self._is_orphan():
                said = f"its launcher (process {self._launcher}) is gone"
                self._lose(self._own.rank, f"{self._who(self._own.rank)}: {said}")
                for link in self._links.values():
                    link.say(failed=said, code=self._code)
                self._launcher = os.getppid()
            if self._lost and not self._noticed.is_set():
                self._noticed.set()
                # a silent host has no launcher here; others of it are noticed as soon
                end = time.monotonic() + (_GRACE if self._losses else _POLL)
                for rank, link in self._links.items():
                    if rank not in self._lost and self._own.rank not in self._lost:
                        link.say(lost=sorted(self._lost), said=self._loss(), code=self._code)
        if not self._closing.is_set():
            self._end(f"{self._loss()}. {self._advice()}", self._code)

    def _is_orphan(self) -> bool:
        return os.getppid() != self._launcher

    def _hear(self, link: _Link) -> None:
        try:
            words = link.hear()
        except OSError as error:
            if error.errno in _CUT:
                self._silent.add(link.rank)
                self._lose(link.rank)
                self._forget(link)
                return
            words = None
        if words is None:
            ended = f"{self._who(link.rank)} ended without a word: killed, or out of memory"
            self._lose(link.rank, ended)
            self._forget(link)
        for word in words or []:
            self._code = word.get("code", self._code)
            if "failed" in word:
                self._lose(link.rank, f"{self._who(link.rank)} failed: {word['failed']}")
            elif "lost" in word:
                self._lost |= set(word["lost"])
                self._losses.append(word["said"])
            if "lost" not in word:
                self._forget(link)

    def _lose(self, rank: int, how: str = "") -> None:
        self._lost.add(rank)
        self._losses += [how] if how else []

    def _forget(self, link: _Link) -> None:
        if self._links.pop(link.rank, None):
            self._selector.unregister(link.connection)
            link.close()

    def _who(self, rank: int) -> str:
        peer = self._peers[rank]
        return f"rank {rank} (process {peer.pid}) on {peer.place}"

    def _loss(self) -> str:
        """What was lost, machine by machine."""
        machines: dict[int, list[str]] = {}
        for rank in sorted(self._silent):
            machines.setdefault(self._peers[rank].machine, []).append(str(rank))
        silent = [
            f"{self._peers[first].place} with rank {', '.join(ranks)} has not answered"
            f" {self._own.place} for {SILENCE} seconds: the link between them is cut, or it is down"
            for first, ranks in machines.items()
        ]
        return "; ".join([*silent, *self._losses])

    def _advice(self) -> str:
        hosts = sorted({self._peers[rank].host for rank in self._lost})
        advice = f"Look at {' and '.join(hosts)}, then start the command on every host again: with"
        advice += " --resume training goes on from the last checkpoint"
        if _TORCHRUN in os.environ:
            advice += " (torchrun does so by itself while it has --max-restarts left)"
        return advice

    def _end_process(self, message: str, code: int) -> None:
        """End this process; one on each machine says why."""
        here = [peer.rank for peer in self._peers if peer.machine == self._own.machine]
        if self._own.rank == min(set(here) - self._lost, default=self._own.rank):
            sys.stdout.flush()
            print(PREFIX.format("train") + message, file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it when it gives up
            try:
                raise LostPeerError(message)
            except LostPeerError as error:
                with contextlib.suppress(OSError):
                    get_error_handler().record_exception(error)
        if self._silent and _TORCHRUN in os.environ and not self._is_orphan():
            _stop_stuck_agent(self._launcher)
        os._exit(code)


def _stop_stuck_agent(agent: int) -> None:
    """Where torchrun's agent cannot reach the store at which it meets the others, let a child stop
    it after this process.

    Without the store nothing can be agreed on, so the agent should give up. But it reads there
    without a limit of time, and would outlive its run until the kernel gives the connection up,
    after a quarter of an hour.
    """
    address, _, port = _endpoint(agent).rpartition(":")
    if not (address and port.isdecimal()):
        return
    with contextlib.suppress(OSError):
        socket.create_connection((address.strip("[]"), int(port)), timeout=_REACH).close()
        return
    if os.fork():
        return
    os.setsid()
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end:
                os.kill(agent, 0)
                time.sleep(_POLL)
            os.kill(agent, number)
    os._exit(0)


def _endpoint(agent: int) -> str:
    """torchrun's `--rdzv-endpoint`, where it can be told; else ""."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{agent}/cmdline").read_text(errors="replace").split("\0")
        for number, word in enumerate(line):
            if word == "torch.distributed.run" or os.path.basename(word) == "torchrun":
                own, _ = get_args_parser().parse_known_args(line[number + 1 :])
                return str(own.rdzv_endpoint)
    return ""


@contextlib.contextmanager
def heartbeat(address: str) -> Iterator[None]:
    """Watch over the other processes while the body runs; all of them enter it together.

    If one is lost, this process ends with exit code `RESUME_ME`, or the code of an error in
    that one; one process on each machine says on standard error which host it was and what to do.

    Args:
        address: of the machine of rank 0, as this one reaches it.

    Raises:
        ValueError: if a process cannot reach that of rank 0; it names both hosts.
    """
    if comm.get_world_size() < 2 and _TORCHRUN not in os.environ:
        yield
        return
    beat = _start(address)
    try:
        yield
    except Exception as error:
        mistake = mistake_of(error)
        if not mistake and (isinstance(error, dist.DistError) or _NETWORK.search(str(error))):
            beat.await_end(_GRACE)
        beat.close(mistake or f"{type(error).__name__}: {error}", 2 if mistake else 1)
        raise
    except KeyboardInterrupt:
        beat.close("interrupted")
        raise
    except BaseException:
        beat.close()
        raise
    beat.close()


def _start(address: str) -> Heartbeat:
    """Connect the processes, and start this one's thread."""
    rank = comm.get_rank()
    machine = 0
    if dist.is_initialized():
        machine = min(dist.get_process_group_ranks(comm.get_local_process_group()))
    server, token = _listener() if rank == 0 else None, secrets.token_bytes(_TOKEN)
    port = server.getsockname()[1] if server else 0
    own = Peer(rank, machine, socket.gethostname(), os.getpid())
    gathered = comm.all_gather((own, port, token))
    peers = [peer for peer, _, _ in gathered]
    _, port, token = gathered[0]
    links, ends, error = [], ("", ""), ""
    if rank > 0:
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT)
            connection.sendall(token + rank.to_bytes(4, "big"))
            ends = (connection.getsockname()[0], connection.getpeername()[0])
            links = [_Link(connection, 0)]
        except OSError as failure:
            error = f"host {own.host} cannot reach port {port} of {address}, rank 0's: {failure}"
    connected = comm.all_gather((ends, error))
    if refused := [error for _, error in connected if error]:
        raise ValueError(
            f"{refused[0]}. The processes of a run connect to each other on any port: let the"
            " firewalls between these hosts pass them"
        )
    peers = [peer._replace(address=here) for peer, ((here, _), _) in zip(peers, connected)]
    shown = [there for peer, ((_, there), _) in zip(peers, connected) if peer.machine > 0]
    peers[0] = peers[0]._replace(address=shown[0] if shown else "")
    if server:
        with server:
            links = list(_accept(server, token, len(peers)))
    return Heartbeat(peers, rank, links)


def _listener() -> socket.socket:
    """A server on a free port of all addresses, of both kinds where there are both."""
    if socket.has_dualstack_ipv6():
        options: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    else:
        options = {}
    return socket.create_server(("", 0), backlog=4096, **options)


def _accept(server: socket.socket, token: bytes, processes: int) -> Iterator[_Link]:
    """The connections of all other processes, which they have made; a stranger's is closed."""
    awaited = set(range(1, processes))
    server.settimeout(_CONNECT)
    while awaited:
        connection, _ = server.accept()
        connection.settimeout(_POLL)
        greeting = b""
        with contextlib.suppress(OSError):
            greeting = connection.recv(_TOKEN + 4, socket.MSG_WAITALL)
        rank = int.from_bytes(greeting[_TOKEN:], "big")
        if hmac.compare_digest(greeting[:_TOKEN], token) and rank in awaited:
            awaited.remove(rank)
            yield _Link(connection, rank)
        else:
            connection.close()


def _forget_in_child() -> None:
    """Close a forked child's copies: else a killed process would seem alive as long as its data
    workers."""
    for connection in _Link.open:
        connection.close()
    _Link.open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
