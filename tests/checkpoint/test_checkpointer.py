"""Checkpoints are written whole or not at all, and read only when whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import pytest
import torch
from torch import nn

from fpn_plugin.checkpoint.checkpointer import (
    Checkpointer,
    find_checkpoint,
    is_whole,
)

FIRST, SECOND = "model_0000001.pth", "model_0000003.pth"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of a run; the weight says which."""
    for age, name in enumerate((FIRST, SECOND)):
        checkpointer(tmp_path, float(age)).save(name[:-4], iteration=age)
        os.utime(tmp_path / name, (age, age))
    return tmp_path


def checkpointer(folder: Path, weight: float = -1.0) -> Checkpointer:
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, weight)
    return Checkpointer(model, str(folder))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_saves_leave_nothing_beside(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {FIRST, SECOND, "last_checkpoint"}
    resumed = checkpointer(folder)
    assert resumed.resume_or_load("", resume=True)["iteration"] == 1
    assert (resumed.model.weight == 1).all()


@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "missing"]
)
def test_falls_back_to_the_newest_whole_one(
    damage: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / SECOND)
    resumed = checkpointer(folder)
    assert resumed.has_checkpoint() and Path(resumed.get_checkpoint_file()).name == FIRST
    resumed.resume_or_load("", resume=True)
    assert (resumed.model.weight == 0).all()
    assert f"{SECOND} is missing or broken" in caplog.text and FIRST in caplog.text


def test_untagged_checkpoint_is_found(folder: Path) -> None:
    (folder / "last_checkpoint").unlink()
    assert Path(find_checkpoint(str(folder))).name == SECOND


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_no_whole_checkpoint_is_an_error(damage: Callable[[Path], None], folder: Path) -> None:
    for name in (FIRST, SECOND):
        damage(folder / name)
    with pytest.raises(ValueError, match=f"OUTPUT_DIR.*is whole.*{SECOND}.*--overwrite"):
        checkpointer(folder).resume_or_load("", resume=True)


def test_empty_folder_has_none(tmp_path: Path) -> None:
    assert (
        not checkpointer(tmp_path).has_checkpoint() and find_checkpoint(str(tmp_path / "no")) == ""
    )


def test_what_a_killed_save_left_is_ignored_and_removed(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    (folder / "model_0000005.pth.tmp").write_bytes(whole[: len(whole) // 2])
    (folder / "last_checkpoint.tmp").write_text("model_00")
    (folder / "mine.tmp").write_text("")
    assert Path(find_checkpoint(str(folder))).name == SECOND
    Checkpointer(nn.Linear(1, 1), str(folder), save_to_disk=False)
    assert (folder / "last_checkpoint.tmp").exists(), "who only reads leaves a running save alone"
    checkpointer(folder)
    assert {file.name for file in folder.iterdir()} == {
        FIRST,
        SECOND,
        "last_checkpoint",
        "mine.tmp",
    }


def test_others_files_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model_pretrained.pth")
    (tmp_path / "text.pth").write_text("no")
    assert find_checkpoint(str(tmp_path)) == ""
    assert is_whole(tmp_path / "model_pretrained.pth") and not is_whole(tmp_path / "text.pth")
