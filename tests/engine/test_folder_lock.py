"""Two runs at the same time never share a folder; a dead one's lock is gone with it."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_child import Child, hold_folder, is_alive
from folders import DATA, RUN_FILES, digest, fill, run_setup

from fpn_plugin.engine import lazy
from fpn_plugin.engine.folder_lock import LOCK, FolderInUseError, hold, release

ROOT = Path(__file__).resolve().parents[2]


def test_the_second_run_is_refused_until_the_first_is_dead(tmp_path: Path, log: Any) -> None:
    fill(tmp_path, RUN_FILES)
    torch.save({}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    before = digest(tmp_path)
    first = Child(str(tmp_path), target=hold_folder)
    assert first.wait_for("held", 1)
    who = f"'{tmp_path}' is in use: process {first.process.pid} on {socket.gethostname()}"
    for flags in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(FolderInUseError, match=f"OUTPUT_DIR {who} .*since 20.*another"):
            run_setup(*flags, "OUTPUT_DIR", str(tmp_path), *DATA)
    assert digest(tmp_path) == before
    assert first.kill() == -signal.SIGKILL
    (worker,) = first.workers
    assert is_alive(worker), "it must not keep the lock of its killed parent"
    run_setup("--overwrite", "OUTPUT_DIR", str(tmp_path), *DATA)
    os.kill(worker, signal.SIGKILL)
    release(str(tmp_path))


def test_a_python_config_run_and_an_evaluation(tmp_path: Path, log: Any) -> None:
    first = Child(str(tmp_path), target=hold_folder)
    assert first.wait_for("held", 1)
    args = argparse.Namespace(
        config_file=str(ROOT / "configs" / "lazy" / "faster_rcnn_trees_FPN.py"),
        opts=[f"train.output_dir={tmp_path}"],
        **{"eval_only": False, "resume": False, "overwrite": True, "machine_rank": 0},
        allow_partial=False,
    )
    with pytest.raises(FolderInUseError, match="train.output_dir .* is in use: process"):
        lazy.setup(args)
    weights = tmp_path / "model.pth"
    weights.touch()
    cfg = run_setup(
        *("--eval-only", "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(weights), *DATA)
    )
    assert cfg.OUTPUT_DIR == str(tmp_path / "eval-1")
    first.kill()
    for worker in first.workers:
        os.kill(worker, signal.SIGKILL)


def test_one_process_may_ask_twice_and_give_back(tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    hold(folder, "OUTPUT_DIR")
    hold(folder, "OUTPUT_DIR")
    with open(tmp_path / "new" / LOCK) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release(folder)
    with open(tmp_path / "new" / LOCK) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release(folder)


def test_where_nothing_can_be_locked_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", cannot)
    hold(str(tmp_path), "OUTPUT_DIR")
    assert "OUTPUT_DIR" in caplog.text and "has no locks" in caplog.text
