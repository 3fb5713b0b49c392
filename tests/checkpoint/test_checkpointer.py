"""Checkpoints are written whole or not at all, and read only when whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from fpn_plugin.checkpoint.checkpointer import (
    Checkpointer,
    StrictCheckpointer,
    find_checkpoint,
    is_whole,
)

FIRST, SECOND = "model_0000001.pth", "model_0000003.pth"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of a run; the weight says which."""
    tmp_path = Path(tempfile.mkdtemp(dir=tmp_path))  # each message is logged once, and names it
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


class Detector(nn.Module):
    """The parts of a detector that a checkpoint's names tell apart."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"bottom_up": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))}
        )
        self.backbone["fpn_lateral2"] = nn.Conv2d(4, 4, 1)
        self.head = nn.ModuleDict({"cls": nn.Conv2d(4, classes, 1)})
        self.head["shared"] = self.head["cls"]
        self.register_buffer("pixel_mean", torch.zeros(3), False)


def strict(
    state: dict[str, Tensor], file: Path, allow_partial: bool = False, **more: Any
) -> nn.Module:
    """A detector with what a file with this state has."""
    torch.save({"model": state, **more}, file)
    model = Detector()
    StrictCheckpointer(model, "", allow_partial, "MODEL.WEIGHTS").load(str(file))
    return model


def test_an_evaluation_takes_what_detectron2_lets_pass(tmp_path: Path) -> None:
    state = Detector().state_dict()
    del state["backbone.bottom_up.1.num_batches_tracked"], state["head.shared.bias"]
    state |= {"pixel_mean": torch.ones(3), "pixel_std": torch.ones(3)}
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    model = strict(state, tmp_path / "model.pth")
    assert torch.equal(model.state_dict()["head.cls.bias"], state["head.cls.bias"])
    assert not model.pixel_mean.any(), "the config's count"
    strict({f"module.{name}": x for name, x in state.items()}, tmp_path / "model.pth")
    # names are matched, and a classifier of the file is left over, as in Caffe2's own
    state = {name.removeprefix("backbone."): x for name, x in state.items()}
    state["fc1000.weight"] = torch.ones(1)
    strict(state, tmp_path / "model.pth", matching_heuristics=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone.fpn_lateral2.bias": None}, "fpn_lateral2.bias is not in .*MODEL.FPN,"),
        ({"head.cls.bias": torch.ones(5), "head.shared.bias": torch.ones(5)}, r"\(5,\) in the"),
        ({"roi_heads.mask_head.x": torch.ones(1)}, "mask_head.x is not in the .*MODEL.MASK_ON"),
        ({"backbone.bottom_up.1.running_var": None}, "running_var is not .*MODEL.BOTTOM_UP,"),
    ],
)
def test_an_evaluation_refuses_another_models_checkpoint(
    change: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**Detector().state_dict(), **change}
    state = {name: x for name, x in state.items() if x is not None}
    file = tmp_path / "model.pth"
    with pytest.raises(ValueError, match=f"MODEL.WEIGHTS '{file}' does not.*{message}"):
        strict(state, file)
    strict(state, file, allow_partial=True)
    assert "does not fit the config" in caplog.text
