"""Processes of a launcher meet, agree, and fail together; here they are threads, but for one run of
torchrun."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_config

from fpn_plugin.engine import agreement, peers, rendezvous
from fpn_plugin.engine.agreement import Report, find_difference, gpu_index
from fpn_plugin.engine.peers import PeerFailure, Peers
from fpn_plugin.engine.place import Place

VERSIONS = {"fpn_plugin": "1.0", "torch": "2.9", "detectron2": "0.6"}
SETTINGS = {"SOLVER.BASE_LR": 0.02, "MODEL.FPN.NORM": "GN"}
TIMEOUT = timedelta(seconds=30)


def report(rank: int, **changes: Any) -> Report:
    """Two processes on each host, each with a GPU."""
    place = Place(rank, 4, rank % 2, 2, "torchrun", "a", 1)
    host, gpu = "ab"[rank // 2], f"gpu-{rank % 2}"
    base = Report(host, place, VERSIONS, "cuda", 2, gpu, SETTINGS)
    return dataclasses.replace(base, **changes)


def reports(**changes: Any) -> list[Report]:
    """Of four processes, the third of which differs: the first one on host b."""
    return [report(0), report(1), report(2, **changes), report(3)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"versions": {**VERSIONS, "torch": "2.4"}}, "has torch 2.4, not 2.9, as host a (rank 0)"),
        (
            {"settings": {**SETTINGS, "SOLVER.BASE_LR": 0.1}},
            "has another config than host a (rank 0): SOLVER.BASE_LR 0.1, not 0.02",
        ),
        ({"settings": {"SOLVER.BASE_LR": 0.02}}, "MODEL.FPN.NORM None, not 'GN'"),
        ({"place": report(2).place._replace(local_processes=1)}, "runs 1 processes, and host a"),
        ({"place": report(2).place._replace(local_rank=1)}, "--distribution=block"),
        ({"device": "cpu", "gpus": 0, "gpu": ""}, "sees no GPU, but host a (rank 0) does"),
        ({"gpu": ""}, "has the local rank 0, but sees 2 GPUs"),
        ({"ahead": -100.0}, "is 100 seconds behind that of host a (rank 0)"),
    ],
)
def test_what_must_not_differ(changes: dict[str, Any], message: str) -> None:
    difference = find_difference(reports(**changes))
    assert message in difference and "host b (rank 2)" in difference


def test_a_shared_gpu_and_what_may_differ() -> None:
    assert not find_difference(reports(ahead=30.0))
    assert not find_difference([report(r, device="cpu", gpus=0, gpu="") for r in range(4)])
    shared = [*reports()[:3], report(3, gpu="gpu-0")]
    message = "host b (rank 3) sees the GPU of rank 2 alone: each process needs one of its own"
    assert find_difference(shared).startswith(message)


@pytest.mark.parametrize(
    "gpus, local_rank, index", [(0, 0, None), (1, 3, 0), (4, 3, 3), (2, 3, None)]
)
def test_the_own_gpu(
    gpus: int, local_rank: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert gpu_index(Place(local_rank, 4, local_rank, 4, "srun", "a", 1)) == index


@pytest.fixture
def store() -> dist.Store:
    """The server of a store that outlives attempts, as torchrun's agent has it."""
    return dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)


def in_each(store: Any, work: Callable[[Peers], Any], processes: int = 2) -> list[Any]:
    """Meet in a thread for each process, and then work; the results, or errors, by rank."""

    def run(rank: int) -> Any:
        place = Place(rank, processes, rank, processes, "torchrun", "127.0.0.1", store.port)
        client = dist.TCPStore("127.0.0.1", store.port, None, False, TIMEOUT)
        try:
            return work(Peers(place, peers._of_this_attempt(place, client, TIMEOUT), TIMEOUT))
        except Exception as error:
            return error

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


def agree(changed: int = -1, **changes: Any) -> Callable[[Peers], Any]:
    def work(group: Peers) -> str:
        rank, place = group.place.rank, group.place
        values = {"host": f"host-{rank}", "place": place, "device": "cpu"}
        changed_values = changes if rank == changed else {}
        try:
            group._agree(report(rank, **{**values, **changed_values}))
        except Exception as error:
            group.fail(error)
            raise
        return "agreed"

    return work


def test_attempts_on_one_store(store: Any) -> None:
    """What an earlier attempt has left does not speak in a later one, also not of a larger one."""
    difference, *others = in_each(store, agree(2, settings={}), processes=3)
    assert "host host-2 (rank 2) has another config" in str(difference)
    assert [type(error) for error in others] == [PeerFailure, PeerFailure]
    assert in_each(store, agree()) == ["agreed", "agreed"]


def test_one_speaks(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that fails does, and rank 0 where all fail alike."""
    for name, seconds in (("_PRECEDENCE", 0.3), ("_GRACE", 0.6)):
        monkeypatch.setattr(peers, name, seconds)

    def fail_alike(group: Peers) -> int:
        return group.fail(FileNotFoundError(2, "no such file", "a.yaml"))

    assert in_each(store, fail_alike) == [0, 2]

    def lose_a_peer(group: Peers) -> int:
        if group.place.rank == 0:
            return group.fail(RuntimeError("Connection closed by peer"))
        time.sleep(0.2)
        return group.fail(KeyError("unexpected"))

    assert in_each(store, lose_a_peer) == [1, 0]


def test_waiting_ends_with_a_failure(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_GRACE", 0.1)

    def work(group: Peers) -> Any:
        if group.place.rank == 1:
            return group.fail(FileNotFoundError(2, "no such file", "a.yaml"))
        with pytest.raises(PeerFailure):
            group._agree(report(0))
        return group.fail(PeerFailure("another process has failed"))

    assert in_each(store, work) == [2, 0]


def test_clocks_are_compared_at_one_moment(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may take long to come: its clock is read when all are there."""
    monkeypatch.setattr(agreement, "CLOCK_TOLERANCE", 0.5)
    start = time.monotonic()

    def work(group: Peers) -> str:
        time.sleep(1.0 * group.place.rank)
        return agree()(group)

    assert in_each(store, work) == ["agreed", "agreed"] and time.monotonic() - start > 1


def test_an_address_that_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(1, 2, 1, 2, "srun", "127.0.0.1", 1)
    with pytest.raises(ValueError, match="MASTER_ADDR 127.0.0.1, MASTER_PORT 1: rank 1 of 2, on"):
        peers._connect(place, timedelta(seconds=1))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"processes": 4}, r"--num-gpus times --num-machines is 4 on host .* and 2 on host"),
        ({"device": "cpu"}, r"host .* \(rank 1\) computes on the CPU, but host .* on GPUs"),
    ],
)
def test_machines_of_detectron2s_launcher(
    store: Any, other: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"processes": 2, "device": "cuda", **other}
    rendezvous._compare_machines(store, 0, 2, "cuda")
    assert not store.check([rendezvous._DIFFERENCE])
    rendezvous._compare_machines(store, 1, **arguments)
    assert re.search(message, store.get(rendezvous._DIFFERENCE).decode())


def test_torchrun(dataset: Path, tmp_path: Path) -> None:
    """Two processes train in one folder, which the first has claimed, and evaluate; what a config
    says wrong is said once."""
    config, images = tmp_path / "tiny.yaml", str(dataset.parent)
    data = [f"--{half}-{kind}" for half in ("train", "val") for kind in ("json", "images")]
    words = [word for pair in zip(data, (str(dataset), images) * 2) for word in pair]
    keys = {"SOLVER__MAX_ITER": 2, "MODEL__RESNETS__WIDTH_PER_GROUP": 8}
    cfg = tiny_config(tmp_path / "run", **keys, MODEL__RESNETS__RES2_OUT_CHANNELS=32)
    cfg.DATASETS.TRAIN = ()
    config.write_text(cfg.dump())
    done = run_torchrun("train", str(config), *words)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("batch     2 images, 1 in each of 2 processes") == 1
    assert done.stdout.count("Done.") == 1
    assert (tmp_path / "run" / "model_final.pth").is_file()
    assert {file.name for file in (tmp_path / "run").glob("log*")} == {"log.txt", "log.txt.rank1"}
    refused = run_torchrun("train", str(config), *words)
    assert refused.returncode == 1  # torchrun's
    assert refused.stdout.count("fpn train: error: OUTPUT_DIR") == 1
    assert "exitcode  : 2" in refused.stdout


def run_torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fpn_plugin"]
    return subprocess.run(
        [sys.executable, "-m", *launch, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
