"""Faults of runs that torchrun restarts, each tried on this machine: what is seen, what is lost.

python tests/engine/elastic_faults.py [a scenario …]

It takes minutes and is no part of the tests. Two agents in folders of their own stand for two hosts
without a common folder.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import torch
from agents import PATIENCE, RETINANET, Agent, Store, training, write_config
from crash_child import is_alive, waits
from test_resume import assert_same
from tiny import write_dataset

from fpn_plugin.checkpoint.run_folder import metric_lines

MAX_ITER, PERIOD = 150, 10
BEFORE = "model_0000019.pth"  # the checkpoint after which something happens


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
    state.pop("fpn_plugin")  # the config with which it went on
    return state


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


def losses(host: Path) -> set[int]:
    """The iterations that metrics.json has a line of."""
    return {line["iteration"] for line in metric_lines(str(host / "output"))}


def killed_rank(scene: Scene, config: str = "rcnn", *words: str) -> str:
    """One process is killed: both hosts start again with all processes."""
    agents = scene.start(f"killed-rank-{config}", config, *words)
    first, other = agents
    # not the file: with --overwrite an older run may have left it
    saving = f"Saving checkpoint to output/{BEFORE}"
    assert any(saving in first.text + other.text for _ in waits(PATIENCE)), first.text
    first.kill_worker()
    assert [agent.end() for agent in agents] == [0, 0], first.text + other.text
    assert "going on as with --resume" in first.text + other.text
    host = main_of([first.folder, other.folder])
    assert_same(final(host), scene.unbroken(config))
    return "both hosts go on; weights and all state bit-equal"


def killed_host(scene: Scene, main_host: bool = True) -> str:
    """A whole host is lost: the other one goes on alone, with the total batch and the schedule."""
    agents = scene.start("killed-host", "rcnn")
    lost, left = ranked_when_saved(agents)
    if not main_host:
        lost, left = left, lost
    lost.kill_host()
    assert left.end() == 0, left.text
    assert "batch     2 images;" in left.text, left.text  # in one process
    assert (left.output / "model_final.pth").exists()
    start = re.findall("Starting training from iteration ([0-9]+)", left.text)[-1]
    assert int(start) > PERIOD and (losses(left.folder) or main_host)
    return f"the other goes on alone from iteration {start}; lost: the steps since then"


def killed_host_comes_back(scene: Scene) -> str:
    """The host of rank 0 is lost, and an empty one takes its place: as many processes as before."""
    agents = scene.start("host-again", "rcnn", nodes="2")
    lost, left = ranked_when_saved(agents)
    lost.kill_host()
    fresh = scene.agent("host-again/host-2", scene.store, "rcnn", nodes="2")
    assert [agent.end() for agent in (left, fresh)] == [0, 0], left.text + fresh.text
    assert_same(final(main_of([left.folder, fresh.folder])), scene.unbroken("rcnn"))
    return "an empty host is sent the checkpoint; weights and all state bit-equal"


def killed_agent(scene: Scene) -> str:
    """An agent alone is killed, not its processes: they end by themselves, the others go on."""
    agents = scene.start("killed-agent", "rcnn")
    lost, left = ranked_when_saved(agents)
    workers = lost.kill()
    start = time.monotonic()
    assert any(not any(map(is_alive, workers)) for _ in waits(30)), lost.text
    seconds = time.monotonic() - start
    assert left.end() == 0, left.text
    return f"its processes end after {seconds:.1f} s, the other host goes on alone"


def full_disk(scene: Scene) -> str:
    """Rank 0 has no room for its checkpoints: it says so, and what was saved stays."""
    agents = scene.start("full-disk", "rcnn", nodes="2", limits=(64, 64))
    codes = [agent.end() for agent in agents]
    text = agents[0].text + agents[1].text
    assert all(codes) and "File too large: model_0000009.pth was not written" in text, text
    store = Store()
    agents = [
        scene.agent(f"full-disk/host-{i}", store, "rcnn", "--resume", nodes="2") for i in range(2)
    ]
    assert [agent.end() for agent in agents] == [0, 0], agents[0].text
    assert_same(final(main_of([agent.folder for agent in agents])), scene.unbroken("rcnn"))
    return "torchrun ends with the message of rank 0, after its restarts; --resume goes on"


def old_folder(scene: Scene) -> str:
    """A new torchrun on the folder of an old run, and hosts with checkpoints of other runs."""
    scene.unbroken("rcnn")
    shutil.copytree(scene.root / "unbroken" / "rcnn", scene.root / "old")
    store = Store()
    agents = [scene.agent(f"old/host-{i}", store, "rcnn", nodes="2") for i in range(2)]
    codes = [agent.end() for agent in agents]
    text = agents[0].text + agents[1].text
    assert all(codes) and "holds another run's results" in text, text
    shutil.rmtree(scene.root / "old" / "host-1" / "output")
    other = scene.unbroken("retinanet") and scene.root / "unbroken" / "retinanet" / "host-1"
    shutil.copytree(other / "output", scene.root / "old" / "host-1" / "output")
    store = Store()
    agents = [scene.agent(f"old/host-{i}", store, "rcnn", "--resume", nodes="2") for i in range(2)]
    codes = [agent.end() for agent in agents]
    text = agents[0].text + agents[1].text
    assert all(codes) and "the hosts have checkpoints that are of different runs" in text, text
    return "refused; with --resume, checkpoints of two runs are refused, with hosts and folders"


def ranked_when_saved(agents: list[Agent]) -> list[Agent]:
    """The agent of rank 0 first, when both have a checkpoint."""
    for agent in agents:
        agent.wait_for(BEFORE)
    return sorted(agents, key=lambda agent: not list(agent.output.glob("events*")))


SCENARIOS: dict[str, Callable[[Scene], str]] = {
    "killed rank": killed_rank,
    "killed rank, RetinaNet": lambda scene: killed_rank(scene, "retinanet"),
    "killed rank, --overwrite": lambda scene: killed_rank(scene, "rcnn", "--overwrite"),
    "killed host of rank 0": killed_host,
    "killed host of rank 0, an empty one comes": killed_host_comes_back,
    "killed agent": killed_agent,
    "full disk on rank 0": full_disk,
    "old folder": old_folder,
}

if __name__ == "__main__":
    main()
