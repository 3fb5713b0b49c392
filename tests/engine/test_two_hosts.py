"""Two machines without a common folder, one agent of torchrun on each, and what comes between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
import torch
from agents import ROOT, training, write_config
from test_resume import assert_same
from tiny import write_dataset
from two_hosts import Host, Hosts, missing, two_hosts, wait_until

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
AGENT = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
AGENT += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "alpha:29512", "--rdzv-id", "7"]
ENVIRON = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# else an agent that is new finds no address of rank 0 where that stays
ENVIRON["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path / "hosts") as made:
        yield made


def start(host: Host, train: list[str], *words: str) -> subprocess.Popen[str]:
    agent = [sys.executable, *AGENT, *words, "--local-addr", host.name]
    return host.start([*agent, *train], **ENVIRON)


def wait_for(file: Path, agents: list[subprocess.Popen[str]], hosts: Hosts) -> None:
    wait_until(lambda: file.exists() or any(agent.poll() is not None for agent in agents))
    assert file.exists(), hosts.alpha.output + hosts.beta.output


def test_a_cut_link_is_named_and_both_sides_stop_within_a_minute(
    hosts: Hosts, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", SOLVER__MAX_ITER=10**5)
    train = training(config, write_dataset(tmp_path), "MODEL.DEVICE", "cpu")
    agents = [start(host, train) for host in hosts.both]
    wait_for(hosts.alpha.disk / "output" / "last_checkpoint", agents, hosts)
    hosts.cut()
    said = "has not answered host"
    seconds = wait_until(lambda: all(agent.poll() is not None for agent in agents))
    assert seconds < 60, seconds
    for host, other in ((hosts.alpha, "beta"), (hosts.beta, "alpha")):
        assert f"error: host {other} (" in host.output and f"Look at {other}" in host.output
        assert said in host.output
    assert all(agent.returncode for agent in agents)


def test_a_slow_host_whose_agent_is_killed_ends_with_the_weights_of_an_unbroken_run(
    hosts: Hosts, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "config.yaml", SOLVER__MAX_ITER=16, SOLVER__CHECKPOINT_PERIOD=4
    )
    train = training(config, write_dataset(tmp_path), "MODEL.DEVICE", "cpu")
    hosts.slow(hosts.beta)
    first, lost = [start(host, train, "--max-restarts", "3") for host in hosts.both]
    wait_for(hosts.alpha.disk / "output" / "model_0000003.pth", [first, lost], hosts)
    lost.send_signal(signal.SIGKILL)  # its process ends by itself
    wait_until(lambda: not hosts.beta.processes())
    again = start(hosts.beta, train, "--max-restarts", "3")
    assert [first.wait(120), again.wait(120)] == [0, 0], hosts.alpha.output + hosts.beta.output
    assert "going on as with --resume" in hosts.alpha.output + hosts.beta.output
    command = [sys.executable, *train, "--num-gpus", "2"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **ENVIRON}, check=True)
    finals = [
        torch.load(folder / "output" / "model_final.pth", weights_only=True)
        for folder in (hosts.alpha.disk, tmp_path)
    ]
    for final in finals:
        final.pop("fpn_plugin")  # the record of the run
    assert_same(*finals)
