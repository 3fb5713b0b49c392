"""How the processes of a run find each other: torch's TCP store, with a word on who is missing.

Importing this module registers it with torch, for the addresses that :func:`announced` gives.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any, Iterator
from urllib.parse import parse_qs, urlsplit

from torch.distributed import TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

_SCHEME, _TCP = "fpn-tcp", "tcp"
_JOINED = "fpn_plugin/joined"
_PAUSE = 15.0  # seconds between two words
_POLL = 0.2


def announced(dist_url: str, first: int) -> str:
    """The address to give to torch in place of a `--dist-url`; others than `tcp://` stay.

    Args:
        first: the rank of this machine's first process, which speaks for all of them.
    """
    is_tcp = dist_url.startswith(f"{_TCP}://")
    return f"{_SCHEME}{dist_url[len(_TCP):]}?first={first}" if is_tcp else dist_url


def _rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[TCPStore, int, int]]:
    """Join the other processes, and wait for all.

    Args:
        url: with the rank and the number of processes, as torch appends them.

    Raises:
        ValueError: naming the address, if it cannot be used, or for those that do not come in time.
    """
    parts = urlsplit(url)
    query = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
    rank, processes = query["rank"], query["world_size"]
    address, place = f"{_TCP}://{parts.netloc}", (parts.hostname, parts.port)
    if not parts.hostname or not parts.port:
        raise ValueError(f"--dist-url {address}: give a host and a port, as tcp://10.0.0.1:29500")
    waiting = _Waiting(timeout, is_told=rank == query["first"])
    while rank > 0 and not _answers(place):
        waiting.wait(f"1 of {processes} processes at {address}, that of rank 0")
    try:
        store = TCPStore(*place, processes, rank == 0, timeout, wait_for_workers=False)
    except RuntimeError as error:  # torch's errors of the network are such
        raise ValueError(
            f"--dist-url {address} cannot be used ({str(error).splitlines()[0]}): it is a port of"
            " the machine of --machine-rank 0; is another run there? Take another"
        ) from error
    joined = store.add(_JOINED, 1)
    while joined < processes:
        waiting.wait(f"{processes - joined} of {processes} processes at {address}")
        joined = store.add(_JOINED, 0)
    yield store, rank, processes
    raise RuntimeError("the processes of a run find each other once")


class _Waiting:
    """Says every so often who is missing, until a time has passed.

    Args:
        is_told: whether it says so.
    """

    def __init__(self, timeout: timedelta, is_told: bool) -> None:
        self._minutes = timeout.total_seconds() / 60
        self._end = time.monotonic() + timeout.total_seconds()
        self._next = time.monotonic() + _PAUSE
        self._is_told = is_told

    def wait(self, missing: str) -> None:
        """Wait a little.

        Raises:
            ValueError: if it was long enough.
        """
        now = time.monotonic()
        if now > self._end:
            raise ValueError(
                f"--rank-timeout: {missing} did not come in {self._minutes:g} minutes: start the"
                " command on each of --num-machines machines, with its own --machine-rank and the"
                " same --dist-url, a port of machine 0 that the others can reach"
            )
        if now > self._next:
            self._next = now + _PAUSE
            if self._is_told:
                print(f"Waiting for {missing}", flush=True)
        time.sleep(_POLL)


def _answers(place: tuple[Any, Any]) -> bool:
    """Whether something listens there: a TCPStore that is asked too early complains at length."""
    try:
        socket.create_connection(place, timeout=_PAUSE).close()
    except OSError:
        return False
    return True


register_rendezvous_handler(_SCHEME, _rendezvous)
