"""The place of a process by the environment of torchrun and srun, and what is refused with one."""

from __future__ import annotations

from typing import Any

import pytest

from fpn_plugin.cli.main import main
from fpn_plugin.engine.place import (
    Place,
    find_place,
    host_name,
    refuse_launch_flags,
    refuse_launcher,
)
from fpn_plugin.engine.setup import argument_parser

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "gpu-01", "MASTER_PORT": "29400"},
}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "6"},
    **{"SLURM_STEP_TASKS_PER_NODE": "3,2,1", "SLURM_STEP_NODELIST": "gpu[07,09-10]"},
    **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1"},
}
IN_BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_JOB_ID": "4711"}


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(3, 4, 1, 2, "torchrun", "gpu-01", 29400)
    assert find_place({**SRUN, **TORCHRUN}) == find_place(TORCHRUN)  # an agent on each node


def test_srun() -> None:
    port = 10_000 + (4711 * 16 + 1) % 20_000
    assert find_place(SRUN) == Place(5, 6, 0, 1, "srun", "gpu07", port)
    own = find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert own is not None and own[-2:] == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("rack[2-3]-gpu[01-04],b", "rack2-gpu01"),
        ("n[001-128]", "n001"),
        ("n[7,3]x", "n7x"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    place = find_place({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert place is not None and place.address == first


@pytest.mark.parametrize(
    "environ", [{}, IN_BATCH_SCRIPT, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, {"MASTER_PORT": "1"}]
)
def test_no_launcher(environ: dict[str, str]) -> None:
    assert find_place(environ) is None


@pytest.mark.parametrize(
    "launcher, changes, message",
    [
        *((TORCHRUN, {name: None}, f"^{name} is not set, but .*unset") for name in TORCHRUN),
        (TORCHRUN, {"RANK": "4"}, "^RANK 4: ranks count from 0 to WORLD_SIZE - 1, 3"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "^LOCAL_RANK 2: .* LOCAL_WORLD_SIZE - 1, 1"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE 8 is more than WORLD_SIZE 4"),
        (TORCHRUN, {"WORLD_SIZE": "two"}, "WORLD_SIZE 'two', which torchrun sets, is no number"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE '0', .* no number from 1"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT '70000' is no port from 1 to 65535"),
        (SRUN, {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set, but SLURM_STEP_NUM_TASKS is"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"SLURM_STEP_TASKS_PER_NODE '2\(x' is not"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "SLURM_NODEID 2: .* has no such node"),
        (SRUN, {"SLURM_STEP_NODELIST": None}, "set MASTER_ADDR to the host of the first task"),
        (SRUN, {"SLURM_JOB_ID": "7_1"}, "SLURM_JOB_ID '7_1', .* set MASTER_PORT"),
    ],
)
def test_a_bad_environment(launcher: dict, changes: dict[str, Any], message: str) -> None:
    environ = {name: value for name, value in {**launcher, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        find_place(environ)


def test_flags_of_the_other_launcher() -> None:
    place = Place(0, 4, 0, 2, "torchrun", "gpu-01", 29400)
    refuse_launch_flags(place, argument_parser().parse_args([]))  # their defaults pass
    words = ["--num-gpus", "2", "--machine-rank", "1", "--dist-url", "tcp://a:1"]
    message = "--num-gpus 2, --machine-rank 1, --dist-url tcp://a:1: torchrun .* leave out these"
    with pytest.raises(ValueError, match=message):
        refuse_launch_flags(place, argument_parser().parse_args(words))


def test_commands_that_work_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In two processes of a launcher one of them says it."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    errors = []
    for rank in ("3", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank[:1] if rank == "0" else "1")
        with pytest.raises(SystemExit) as end:
            main(["study", "none.yaml"])
        assert end.value.code == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == "" and "fpn study: error: torchrun has started 4 processes" in errors[1]
    refuse_launcher(Place(0, 1, 0, 1, "torchrun", "gpu-01", 29400), "study")


def test_the_name_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert host_name() == "node7" and str(find_place(SRUN)) == "rank 5 of 6, on node7"
