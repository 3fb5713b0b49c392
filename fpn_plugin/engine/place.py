"""The place of this process among those that a launcher has started: torchrun, or SLURM's srun.

Detectron2's own launcher (`--num-gpus`, `--num-machines`) starts processes itself and needs none.
"""

from __future__ import annotations

import os
import re
import socket
from typing import Any, Mapping, NamedTuple

TORCHRUN, SRUN, DETECTRON2 = "torchrun", "srun", "--num-machines"

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
# srun alone sets it; what sbatch sets for its script, as SLURM_NTASKS, says nothing of processes
_TASKS = "SLURM_STEP_NUM_TASKS"
# flags that say what a launcher says, with their defaults
_FLAGS = {"num_gpus": (1,), "num_machines": (1,), "machine_rank": (0,), "dist_url": ("auto",)}
# a job's port: below those that the system gives to clients, and another one for each of its steps
_PORTS, _STEPS = range(10_000, 30_000), 16


class Place(NamedTuple):
    """Where a process stands among all that a launcher has started.

    Attributes:
        rank: from 0 to `processes` - 1.
        processes: on all hosts together.
        local_rank: from 0 to `local_processes` - 1.
        local_processes: on this host.
        launcher: "torchrun" or "srun".
        address: the host of rank 0, where the processes meet.
        port: at that address.
    """

    rank: int
    processes: int
    local_rank: int
    local_processes: int
    launcher: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.processes}, on {host_name()}"


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process by its environment; None if no launcher has started it.

    A torchrun that srun has started, one on each host, comes before srun. One task of srun alone
    is a process without a launcher.

    Raises:
        ValueError: naming the variable that is missing or bad.
    """
    if any(name in environ for name in _RANKS):
        return _of_torchrun(environ)
    if _number(environ, _TASKS, SRUN, 1) > 1 if _TASKS in environ else False:
        return _of_srun(environ)
    return None


def refuse_launch_flags(place: Place, args: Any) -> None:
    """Refuse the flags of Detectron2's launcher where another launcher has started the processes.

    Args:
        args: of `fpn_plugin.engine.setup.argument_parser`.

    Raises:
        ValueError: naming the flags.
    """
    automatic = re.compile(r"auto|tcp://127\.0\.0\.1:\d+")  # Detectron2's default has a port
    given = []
    for name, default in _FLAGS.items():
        value = getattr(args, name, default[0])
        is_default = automatic.fullmatch(value) if name == "dist_url" else value in default
        if not is_default:
            given.append(f"--{name.replace('_', '-')} {value}")
    if given:
        raise ValueError(
            f"{', '.join(given)}: {place.launcher} has started {place.processes} processes, and"
            f" says where each of them is: leave out {'this' if len(given) == 1 else 'these'}, or"
            f" start the command without {place.launcher}"
        )


def refuse_launcher(place: Place | None, command: str) -> None:
    """Refuse to run a command that works in one process alone in several at once.

    Raises:
        ValueError: naming the launcher.
    """
    if place and place.processes > 1:
        raise ValueError(
            f"{place.launcher} has started {place.processes} processes, but this command works in"
            f" one: start it without {place.launcher}; of all commands, train alone takes several"
            f" ({command} would do the same work {place.processes} times)"
        )


def host_name() -> str:
    """The name of this host, for messages: SLURM's name of the node, else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _of_torchrun(environ: Mapping[str, str]) -> Place:
    missing = [name for name in (*_RANKS, *_ADDRESS) if not environ.get(name)]
    if missing:
        present = [name for name in _RANKS if name in environ]
        raise ValueError(
            f"{missing[0]} is not set, but {', '.join(present)} {'are' if present[1:] else 'is'}:"
            f" torchrun sets {', '.join((*_RANKS, *_ADDRESS))}, each of them for every process;"
            f" for one process without a launcher unset {', '.join(present)}"
        )
    rank, processes, local_rank, local_processes = (
        _number(environ, name, TORCHRUN, name.endswith("SIZE")) for name in _RANKS
    )
    for name, value, size in (_RANKS[0], rank, processes), (_RANKS[2], local_rank, local_processes):
        if value >= size:
            bound = _RANKS[_RANKS.index(name) + 1]
            raise ValueError(f"{name} {value}: ranks count from 0 to {bound} - 1, {size - 1}")
    if local_processes > processes:
        raise ValueError(f"LOCAL_WORLD_SIZE {local_processes} is more than WORLD_SIZE {processes}")
    address = environ["MASTER_ADDR"], _port(environ)
    return Place(rank, processes, local_rank, local_processes, TORCHRUN, *address)


def _of_srun(environ: Mapping[str, str]) -> Place:
    missing = [name for name in _STEP if name not in environ]
    if missing:
        raise ValueError(f"{missing[0]} is not set, but {_TASKS} is: srun sets both")
    rank, local_rank, node = (_number(environ, name, SRUN) for name in _STEP[:3])
    counts = _tasks_per_node(environ[_STEP[3]])
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID {node}: {_STEP[3]} {environ[_STEP[3]]!r} has no such node")
    address = environ.get("MASTER_ADDR") or _first_host(environ)
    port = _port(environ) if environ.get("MASTER_PORT") else _port_of_step(environ)
    processes = _number(environ, _TASKS, SRUN)
    return Place(rank, processes, local_rank, counts[node], SRUN, address, port)


def _number(environ: Mapping[str, str], name: str, launcher: str, least: int = 0) -> int:
    value = environ[name]
    if not re.fullmatch(r"\d+", value) or int(value) < least:
        raise ValueError(f"{name} {value!r}, which {launcher} sets, is no number from {int(least)}")
    return int(value)


def _port(environ: Mapping[str, str]) -> int:
    value = environ["MASTER_PORT"]
    if not value.isdecimal() or not 0 < int(value) < 2**16:
        raise ValueError(f"MASTER_PORT {value!r} is no port from 1 to {2**16 - 1}")
    return int(value)


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"{_STEP[3]} {text!r} is not as srun sets it, such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(environ: Mapping[str, str]) -> str:
    """`node1` of `node[1-4,7],other`."""
    text = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    first = re.match(r"(?:[^\[,]|\[\d[^\]]*\])+", text)  # up to a comma that is in no brackets
    if first is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST {text!r} does not begin with a host, as srun sets it: set"
            " MASTER_ADDR to the host of the first task"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _port_of_step(environ: Mapping[str, str]) -> int:
    job, step = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not (job.isdecimal() and step.isdecimal()):
        raise ValueError(
            f"SLURM_JOB_ID {job!r}, SLURM_STEP_ID {step!r} are no numbers: set MASTER_PORT"
        )
    return _PORTS[(int(job) * _STEPS + int(step)) % len(_PORTS)]
