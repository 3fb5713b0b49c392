"""How the processes of a run find each other: torch's TCP store, with a word on who is missing.

Importing this module registers it with torch, for the addresses that :func:`announced` gives.
"""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from typing import Any, Iterator
from urllib.parse import parse_qs, urlsplit

from torch.distributed import TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

from fpn_plugin.engine.place import host_name

_SCHEME, _TCP = "fpn-tcp", "tcp"
_JOINED, _FIRST, _DIFFERENCE = "fpn_plugin/joined", "fpn_plugin/first", "fpn_plugin/difference"
_PAUSE = 15.0  # seconds between two words
_POLL = 0.2


def announced(dist_url: str, first: int, device: str = "cpu") -> str:
    """The address to give to torch in place of a `--dist-url`; others than `tcp://` stay.

    Args:
        first: the rank of this machine's first process, which speaks for all of them.
        device: of the model on this machine.
    """
    is_tcp, kind = dist_url.startswith(f"{_TCP}://"), device.partition(":")[0]
    query = f"first={first}&device={kind}"
    return f"{_SCHEME}{dist_url[len(_TCP):]}?{query}" if is_tcp else dist_url


def _rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[TCPStore, int, int]]:
    """Join the other processes, and wait for all.

    Args:
        url: with the rank and the number of processes, as torch appends them.

    Raises:
        ValueError: naming the address, if it cannot be used, or for those that do not come in time;
            naming the host of a machine that has another number of processes or another device.
    """
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    rank, processes = int(query["rank"]), int(query["world_size"])
    address, host, port = f"{_TCP}://{parts.netloc}", parts.hostname, parts.port
    if not host or not port:
        raise ValueError(f"--dist-url {address}: give a host and a port, as tcp://10.0.0.1:29500")
    waiting = _Waiting(timeout, is_told=rank == int(query["first"]))
    while rank > 0 and not _answers(host, port):
        waiting.wait(f"1 of {processes} processes at {address}, that of rank 0")
    try:
        store = TCPStore(host, port, processes, rank == 0, timeout, wait_for_workers=False)
    except RuntimeError as error:  # torch's errors of the network are such
        raise ValueError(
            f"--dist-url {address} cannot be used ({str(error).splitlines()[0]}): it is a port of"
            " the machine of --machine-rank 0; is another run there? Take another"
        ) from error
    _compare_machines(store, rank, processes, query.get("device", "cpu"))
    joined = store.add(_JOINED, 1)
    while joined < processes or store.check([_DIFFERENCE]):
        if store.check([_DIFFERENCE]):
            raise ValueError(store.get(_DIFFERENCE).decode())
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


def _compare_machines(store: TCPStore, rank: int, processes: int, device: str) -> None:
    """Let the others know if this machine would wait for another number of processes than that of
    rank 0, or would compute on another kind of device, which they cannot meet with."""
    if rank == 0:
        store.set(_FIRST, json.dumps([host_name(), processes, device]))
    first_host, first_processes, first_device = json.loads(store.get(_FIRST))
    who, first = f"host {host_name()} (rank {rank})", f"host {first_host} (rank 0)"
    if processes != first_processes:
        store.set(
            _DIFFERENCE,
            f"--num-gpus times --num-machines is {processes} on {who} and {first_processes} on"
            f" {first}: give the same on each machine",
        )
    elif device != first_device:
        without, other = (who, first) if device == "cpu" else (first, who)
        store.set(
            _DIFFERENCE,
            f"{without} computes on the CPU, but {other} on GPUs: look there at"
            " CUDA_VISIBLE_DEVICES and the driver (nvidia-smi), or give MODEL.DEVICE cpu"
            " (train.device=cpu) on each machine",
        )


def _answers(host: str, port: int) -> bool:
    """Whether something listens there: a TCPStore that is asked too early complains at length."""
    try:
        socket.create_connection((host, port), timeout=_PAUSE).close()
    except OSError:
        return False
    return True


register_rendezvous_handler(_SCHEME, _rendezvous)
