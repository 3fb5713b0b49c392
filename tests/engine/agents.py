"""torchrun's agents on this machine, each in a folder of its own, as hosts without a common one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

import torch
from crash_child import is_alive, waits
from tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
# another Detectron2 may be in the way of that which is installed
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
PATIENCE = 240.0  # seconds, on a busy machine
RETINANET = {
    "MODEL__META_ARCHITECTURE": "RetinaNet",
    "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL__RETINANET__NUM_CLASSES": 2,
    "SOLVER__BASE_LR": 1e-3,
}


def write_config(file: Path, **overrides: object) -> Path:
    """A config of the tiny detector that names no data."""
    smaller = {"MODEL__RESNETS__WIDTH_PER_GROUP": 8, "MODEL__RESNETS__RES2_OUT_CHANNELS": 32}
    cfg = tiny_config(Path("output"), **{**smaller, "TEST__EVAL_PERIOD": 0, **overrides})
    cfg.DATASETS.TRAIN = ()
    file.write_text(cfg.dump())
    return file


def training(config: Path, json_file: Path, *words: str) -> list[str]:
    """The words of a command line that trains on a dataset, after those of torchrun."""
    data = ["--train-json", str(json_file), "--train-images", str(json_file.parent)]
    return [str(ROOT / "tools" / "train_net.py"), str(config), *data, *words]


class Store:
    """Where agents meet: a store that no host takes with it when it is lost."""

    def __init__(self) -> None:
        self._store = torch.distributed.TCPStore("localhost", 0, is_master=True)
        self.words = [
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self._store.port}"),
            *("--rdzv-conf", "is_host=0,last_call_timeout=2,timeout=60", "--rdzv-id", "run"),
        ]


class Agent:
    """One agent with its processes.

    Args:
        folder: in which it runs: that of its host.
        words: of torchrun's command line.
        limit: of a file's size in its processes, in KiB: a full disk.
    """

    def __init__(self, folder: Path, words: Sequence[str], limit: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.output = folder, folder / "output"
        self._log = folder / f"agent-{time.time_ns()}.txt"
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        if limit:
            command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
        environ = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def text(self) -> str:
        """What it and its processes have printed."""
        return self._log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Its processes that are at work."""
        file = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(pid) for pid in file.read_text().split() if is_alive(int(pid))]

    def wait_for(self, name: str) -> None:
        """Wait until a file is in its output."""
        for _ in waits(PATIENCE, 0.01):
            if (self.output / name).exists():
                return
            assert self._process.poll() is None, self.text
        raise AssertionError(f"no {name}: {self.text}")

    def kill_worker(self) -> None:
        """SIGKILL for its first process."""
        os.kill(self.workers()[0], signal.SIGKILL)

    def kill(self) -> list[int]:
        """SIGKILL for the agent alone; the processes that it leaves."""
        workers = self.workers()
        self._process.kill()
        self._process.wait()
        return workers

    def kill_host(self) -> None:
        """SIGKILL for the agent and all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> int:
        """Wait for its end; its exit code."""
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.text}") from None
        finally:
            self.kill_host()

    def is_main(self) -> bool:
        """Whether rank 0 is among its processes: that has the terminal's log."""
        return "Starting training from iteration" in self.text


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port
