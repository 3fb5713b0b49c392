"""A full disk, a dead worker, a dead rank: the run stops with a message, and nothing saved is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator
from unittest.mock import Mock

import pytest
import torch
from crash_child import OVERRIDES, PATIENCE, Child, lose_a_rank, run_out_of_room, write_metrics
from detectron2.utils.events import EventStorage
from test_resume import assert_same, final_state
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from fpn_plugin.checkpoint.checkpointer import Checkpointer, SaveError, write_atomically
from fpn_plugin.engine import heartbeat
from fpn_plugin.engine.faults.actionable import actionable_errors
from fpn_plugin.engine.hooks import MetricsWriter, TolerantWriter
from fpn_plugin.engine.launch import RankError, _describe, launch_ranks


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    dataset: Path, unbroken: Path, tmp_path: Path
) -> None:
    args = (str(dataset), str(tmp_path), OVERRIDES)
    child = Child(*args, target=run_out_of_room)
    assert child.end() == 1
    assert child.error.startswith(f"SaveError: [Errno {errno.EFBIG}]")
    for text in ("model_0000003.pth", "needs about 3.", " MiB", "are free", "--resume"):
        assert text in child.error
    assert [file.name for file in tmp_path.glob("*.pth*")] == ["model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    child = Child(*args)
    assert child.end() == 0, child.error
    assert_same(final_state(tmp_path), final_state(unbroken))


class Fails:
    """Something that cannot be pickled, for a reason of one's choice."""

    def __init__(self, reason: Any) -> None:
        self.reason = reason

    def __reduce__(self) -> Any:
        self.reason()
        return (int, ())


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def heeded() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "reason, expected",
    [(full, SaveError), (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)],
    ids=["full", "interrupted"],
)
def test_a_save_that_fails_in_its_middle(
    reason: Any, expected: type[BaseException], heeded: None, tmp_path: Path
) -> None:
    checkpointer = Checkpointer(nn.Linear(1000, 1000), str(tmp_path))
    checkpointer.save("model_0000001")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for name in ("model_0000001", "model_0000003"):
        with pytest.raises(expected):
            checkpointer.save(name, trap=Fails(reason), more=torch.ones(10))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_torchs_own_error_does_not_hide_the_reason(tmp_path: Path) -> None:
    """Its writer raises a RuntimeError when it closes what could not be written."""

    def write(file: Any) -> None:
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(SaveError, match="No space left on device: a.pth was not written") as error:
        write_atomically(tmp_path / "a.pth", write)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "a.pth")


def test_full_disks_elsewhere_are_explained_and_other_errors_are_not(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=f"No space left on device.*free.*{tmp_path}"):
        with actionable_errors("trying", str(tmp_path), list):
            full()
    others = [RuntimeError(text) for text in ("shape mismatch", "CUDA error")]
    for error in (*others, FileNotFoundError(errno.ENOENT, "no", "a"), ValueError("out of memory")):
        with pytest.raises(type(error)) as caught:
            with actionable_errors("trying", str(tmp_path), list):
                raise error
        assert caught.value is error


def test_metrics_wait_for_room(tmp_path: Path) -> None:
    child = Child(str(tmp_path / "metrics.json"), target=write_metrics)
    texts: list[str] = []
    while child.hear():
        texts.append(child.phase)
    assert child.end() == 0
    assert [text.count("\n") for text in texts] == [1, 1, 3]
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0, 0.5, 1]  # medians


def test_a_writer_that_fails_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    writer = TolerantWriter(MetricsWriter("/dev/full"))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        storage.put_image("a", torch.zeros(3, 2, 2, dtype=torch.uint8).numpy())
        writer.write()
        assert not storage._vis_data
        writer.close()
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2 and "MetricsWriter could not write" in errors[0].message
    assert "No space left" in errors[0].message


def test_a_worker_that_dies_stops_the_run(dataset: Path, tmp_path: Path) -> None:
    child = Child(str(dataset), str(tmp_path), OVERRIDES)
    assert child.wait_for("saving", 1) and child.wait_for("step", 2) and child.workers
    start = time.monotonic()
    os.kill(max(child.workers), signal.SIGKILL)
    assert child.end() == 1
    assert time.monotonic() - start < PATIENCE / 2
    for text in ("WorkerError", "killed by signal: Killed", "memory", "DATALOADER.NUM_WORKERS"):
        assert text in child.error
    assert (tmp_path / "last_checkpoint").exists() and not list(tmp_path.glob("*.tmp"))


def test_a_rank_that_dies_stops_the_other(quick_ranks: None, tmp_path: Path) -> None:
    """It also gathers what both ranks skipped, as starting two takes long."""
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", rank_timeout=5)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 .* killed by SIGKILL.*memory.*--resume"):
        launch_ranks(lose_a_rank, args, (str(tmp_path),), "cpu")
    assert time.monotonic() - start < 2 * PATIENCE
    skipped = json.loads((tmp_path / "skipped.json").read_text())
    assert {name: entry["times"] for name, entry in skipped.items()} == {
        "both.jpg": 2,
        "0.jpg": 1,
        "1.jpg": 1,
    }


def test_a_rank_that_fails_is_quoted_with_all_its_lines() -> None:
    said = "Iteration 3: the loss explodes.\n  It begins here.\nWhat may help: no"
    try:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError(f"{said}.")
    except ValueError:
        trace = f"\n\n-- Process 1 terminated with the following error:\n{traceback.format_exc()}\n"
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0)
    text = _describe(ProcessRaisedException(trace, 1, 77), args)
    assert text.startswith(f"rank 1 of 2 (process 77) failed: ValueError: {said}. The others")


@pytest.mark.parametrize(
    "message, waits",
    [
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:4", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("shape mismatch", False),
    ],
)
def test_the_one_that_died_is_named_not_the_one_that_lost_it(
    message: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher names who ended first, so the others give it time."""
    beat = Mock()
    monkeypatch.setattr(heartbeat, "_start", lambda address: beat)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        with heartbeat.heartbeat("a"):
            raise RuntimeError(message)
    assert beat.await_end.called == waits
    beat.close.assert_called_once_with(f"RuntimeError: {message}", 1)
