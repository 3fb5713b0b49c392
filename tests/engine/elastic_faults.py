"""Faults of runs that torchrun restarts, each tried on this machine: what is seen, what is lost.

python tests/engine/elastic_faults.py [a scenario …]

It takes minutes and is no part of the tests. Two agents in folders of their own stand for two hosts
without a common folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import torch
from agents import RETINANET, Agent, Store, training, write_config
from test_resume import assert_same
from tiny import write_dataset

MAX_ITER, PERIOD = 40, 4
BEFORE = "model_0000015.pth"  # the checkpoint after which something happens


class Scene:
    """The data, the configs, and the runs that nothing disturbed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "data").mkdir()
        self.json = write_dataset(root / "data")
        common = {"SOLVER__MAX_ITER": MAX_ITER, "SOLVER__CHECKPOINT_PERIOD": PERIOD}
        self.configs = {
            "rcnn": write_config(root / "rcnn.yaml", **common),
            "retinanet": write_config(root / "retinanet.yaml", **common, **RETINANET),
        }

    def start(
        self, name: str, *words: str, hosts: int = 2, nodes: str = "1:2", limits: Any = (0, 0)
    ) -> list[Agent]:
        """Agents of one run in folders of their own, which are new."""
        store = Store()
        self.store = store  # it lives as long as the run
        return [
            self.agent(f"{name}/host-{i}", store, *words, nodes=nodes, limit=limits[i])
            for i in range(hosts)
        ]

    def agent(
        self, folder: str, store: Store, *words: str, nodes: str = "1:2", limit: int = 0
    ) -> Agent:
        config, *rest = words
        command = training(self.configs[config], self.json, "MODEL.DEVICE", "cpu", *rest)
        launcher = ["--nnodes", nodes, "--max-restarts", "3", *store.words]
        return Agent(self.root / folder, [*launcher, *command], limit)

    def unbroken(self, config: str) -> dict[str, Any]:
        folder = self.root / "unbroken" / config
        if not folder.exists():
            agents = self.start(f"unbroken/{config}", config, nodes="2")
            assert [agent.end() for agent in agents] == [0, 0], agents[0].text
        return final(main_of([folder / "host-0", folder / "host-1"]))


def main_of(hosts: list[Path]) -> Path:
    """The folder of rank 0: copies have no events."""
    return next(host for host in hosts if list(host.glob("output/events*")))


def final(host: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(host / "output" / "model_final.pth")
    return state


def ranked(agents: list[Agent]) -> list[Agent]:
    """The agent of rank 0 first."""
    return sorted(agents, key=lambda agent: not list(agent.output.glob("events*")))


def main() -> None:
    chosen = sys.argv[1:] or list(SCENARIOS)
    root = Path(tempfile.mkdtemp(prefix="elastic-"))
    scene = Scene(root)
    try:
        for name in chosen:
            start = time.monotonic()
            seen = SCENARIOS[name](scene)
            print(f"| {name} | {seen} | {time.monotonic() - start:.0f} s |", flush=True)
    finally:
        for file in root.glob("**/agent-*.txt"):
            keep = Path(tempfile.gettempdir(), f"last-{file.parent.parent.name}-{file.parent.name}")
            shutil.copy(file, f"{keep}-{file.name}")
        shutil.rmtree(root)


def killed_rank(scene: Scene, config: str = "rcnn", *words: str) -> str:
    """One process is killed: both hosts start again with all processes."""
    agents = scene.start(f"killed-rank-{config}", config, *words)
    first, other = agents
    first.wait_for(BEFORE)
    first.kill_worker()
    assert [agent.end() for agent in agents] == [0, 0], first.text + other.text
    assert "going on as with --resume" in first.text + other.text
    host = main_of([first.folder, other.folder])
    assert_same(final(host), scene.unbroken(config))
    return "both hosts go on; weights and all state bit-equal"


SCENARIOS: dict[str, Callable[[Scene], str]] = {
    "killed rank": killed_rank,
    "killed rank, RetinaNet": lambda scene: killed_rank(scene, "retinanet"),
    "killed rank, --overwrite": lambda scene: killed_rank(scene, "rcnn", "--overwrite"),
}

if __name__ == "__main__":
    main()
