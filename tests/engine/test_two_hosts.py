"""Two machines without a common folder, one agent of torchrun on each, and what comes between."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Iterator

import pytest
from tiny import tiny_config, write_dataset
from two_hosts import Hosts, missing, two_hosts, wait_until

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
AGENT = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
AGENT += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "alpha:29512", "--rdzv-id", "7"]
AGENT += ["--rdzv-conf", "read_timeout=10"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path / "hosts") as made:
        yield made


def test_a_cut_link_is_noticed_and_named_within_a_minute(hosts: Hosts, tmp_path: Path) -> None:
    data = write_dataset(tmp_path)
    config = tmp_path / "config.yaml"
    cfg = tiny_config(Path("run"), SOLVER__MAX_ITER=10**5, DATASETS__TRAIN=(), TEST__EVAL_PERIOD=0)
    config.write_text(cfg.dump())
    train = ["-m", "fpn_plugin", "train", str(config), "MODEL.DEVICE", "cpu"]
    train += ["--train-json", str(data), "--train-images", str(tmp_path)]
    root = str(Path(__file__).resolve().parents[2])
    agents = [
        host.start(
            [sys.executable, *AGENT, "--local-addr", host.name, *train],
            PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        )
        for host in hosts.both
    ]
    saved = hosts.alpha.disk / "run" / "last_checkpoint"
    wait_until(lambda: saved.exists() or any(agent.poll() is not None for agent in agents))
    assert saved.exists(), hosts.alpha.output + hosts.beta.output
    hosts.cut()
    said = "has not answered host"
    assert wait_until(lambda: all(said in host.output for host in hosts.both), 60) < 45
    for host, other in ((hosts.alpha, "beta"), (hosts.beta, "alpha")):
        assert f"error: host {other} (" in host.output and f"Look at {other}" in host.output
    assert agents[0].wait(30) != 0
