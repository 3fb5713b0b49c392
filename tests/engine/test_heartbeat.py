"""The threads that notice a lost process, on connections inside of this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Callable, Iterator

import pytest
import torch.distributed as dist

from fpn_plugin.engine import heartbeat
from fpn_plugin.engine.heartbeat import SILENCE, Heartbeat, Peer
from fpn_plugin.engine.interrupt import RESUME_ME

PEERS = [Peer(rank, rank, name, 100 + rank, f"10.0.0.{rank}") for rank, name in enumerate("abc")]


class Run:
    """The heartbeats of a run of three machines, and what each would have ended with."""

    def __init__(self) -> None:
        self.ends: dict[int, tuple[str, int]] = {}
        with heartbeat._listener() as server:
            token, address = b"t" * heartbeat._TOKEN, ("127.0.0.1", server.getsockname()[1])
            clients = [socket.create_connection(address) for _ in range(4)]
            greetings = [b"GET / HTTP/1.0\r\n\r\n\r\n", token + bytes([0, 0, 0, 7])]
            greetings += [token + bytes([0, 0, 0, rank]) for rank in (2, 1)]
            for client, greeting in zip(clients, greetings):
                client.sendall(greeting)
            accepted = list(heartbeat._accept(server, token, 3))
        self.strangers, (third, second) = clients[:2], clients[2:]
        assert [link.rank for link in accepted] == [2, 1]
        self.links = [accepted, [heartbeat._Link(second, 0)], [heartbeat._Link(third, 0)]]
        self.beats = [
            Heartbeat(PEERS, rank, self.links[rank], self._end(rank)) for rank in (0, 1, 2)
        ]

    def _end(self, rank: int) -> Callable[[str, int], None]:
        return lambda message, code: self.ends.update({rank: (message, code)})

    def close(self) -> None:
        for beat in self.beats:
            if not beat._closing.is_set():
                beat.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(heartbeat, "_GRACE", 0.2)
    monkeypatch.setattr(heartbeat, "_POLL", 0.05)
    made = Run()
    yield made
    made.close()
    for stranger in made.strangers:
        stranger.close()


def joined(run: Run, *ranks: int) -> None:
    for rank in ranks:
        run.beats[rank]._thread.join(5)
        assert rank in run.ends


def test_an_orderly_end_alarms_nobody(run: Run) -> None:
    for rank in (1, 0, 2):
        run.beats[rank].close()
    time.sleep(0.3)
    assert run.ends == {} and not heartbeat._Link.open


def test_a_stranger_is_sent_away(run: Run) -> None:
    for stranger in run.strangers:
        stranger.settimeout(5)
        assert stranger.recv(1) == b""


def test_a_killed_process_is_named_everywhere(run: Run) -> None:
    run.links[1][0].connection.shutdown(socket.SHUT_RDWR)  # what the kernel does for it
    joined(run, 0, 2)
    for rank in (0, 2):
        message, code = run.ends[rank]
        assert message.startswith("rank 1 (process 101) on host b (10.0.0.1) ended without a word")
        assert "Look at b, then start the command on every host again: with --resume" in message
        assert code == RESUME_ME


def test_an_error_of_one_ends_all_with_its_message_and_code(run: Run) -> None:
    run.beats[2].close("train.json: no such file", 2)
    joined(run, 0, 1)
    for rank in (0, 1):
        message, code = run.ends[rank]
        assert "rank 2 (process 102) on host c (10.0.0.2) failed: train.json: no" in message
        assert code == 2 and "Look at c" in message


def test_own_errors_leave_before_the_end(run: Run) -> None:
    """All fail with the same message, one after the other."""
    for rank in (1, 2, 0):
        run.beats[rank].close("SOLVER.IMS_PER_BATCH", 2)
    time.sleep(0.3)
    assert run.ends == {}


@pytest.mark.parametrize("number", sorted(heartbeat._CUT))
def test_a_silent_host(run: Run, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def hear() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    run.links[0][0].hear = hear  # type: ignore[assignment,method-assign]
    run.links[2][0].connection.send(b"x")  # rank 0 is to hear
    joined(run, 0, 1)
    said = f"host c (10.0.0.2) with rank 2 has not answered host a (10.0.0.0) for {SILENCE} seconds"
    for rank in (0, 1):
        assert said in run.ends[rank][0]
        assert "torchrun does so by itself" in run.ends[rank][0]


def test_a_process_without_its_launcher_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.beats[1]._launcher = 4
    joined(run, 0, 1, 2)
    said = "its launcher (process 4) is gone"
    for message, code in run.ends.values():
        assert said in message and "on host b" in message and code == RESUME_ME


def test_the_kernel_asks_within_half_a_minute(run: Run) -> None:
    assert SILENCE + 2 < 30
    link = run.links[1][0].connection
    assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for name, value in heartbeat._KEEP_ALIVE.items():
        if hasattr(socket, name):
            assert link.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name


def test_a_forked_worker_does_not_keep_a_dead_process_alive(run: Run) -> None:
    worker = os.fork()
    if not worker:
        time.sleep(30)
        os._exit(0)
    try:
        run.links[1][0].connection.shutdown  # the fork is done: its copies are closed
        run.beats[1]._closing.set()
        run.beats[1]._alarm.send(b"!")
        run.beats[1]._thread.join()
        run.links[1][0].close()
        joined(run, 0)
        assert "host b" in run.ends[0][0]
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


def test_an_error_of_the_network_waits_for_who_is_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_start", lambda address: run.beats[0])
    monkeypatch.setattr(heartbeat.comm, "get_world_size", lambda: 3)
    run.links[1][0].connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(dist.DistNetworkError):
        with heartbeat.heartbeat("a"):
            raise dist.DistNetworkError("Connection closed by peer")
    assert "host b" in run.ends[0][0]  # in a run the process has ended before


def test_a_mistake_does_not_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_start", lambda address: run.beats[2])
    monkeypatch.setattr(heartbeat.comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="port 1 of nowhere"):
        with heartbeat.heartbeat("a"):
            run.links[1][0].connection.shutdown(socket.SHUT_RDWR)
            raise ValueError("host b cannot reach port 1 of nowhere")
    assert 2 not in run.ends
    joined(run, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "flag", [["--rdzv-endpoint", "node0:29500"], ["--rdzv_endpoint=node0:29500"]]
)
def test_the_store_of_an_agent_is_known(flag: list[str]) -> None:
    words = ["torch.distributed.run", "--nnodes", "1:2", *flag, "train.py", "--rdzv-endpoint", "x"]
    with subprocess.Popen([sys.executable, "-c", "input(0)", *words], stdin=-1, stdout=-1) as agent:
        assert agent.stdout and agent.stdout.read(1) == b"0"  # /proc knows its words by now
        assert heartbeat._endpoint(agent.pid) == "node0:29500"
        agent.communicate(b"\n")
    assert heartbeat._endpoint(os.getpid()) == ""


def test_one_process_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_start", pytest.fail)
    with heartbeat.heartbeat("nowhere"):
        pass
