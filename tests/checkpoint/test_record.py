"""The record in a checkpoint is read without its tensors, and only as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.record import make_record, read_record

OLD = Path(__file__).parents[1] / "engine" / "data" / "run_v0_1" / "model_0000001.pth"


def test_the_record_of_a_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD([{"params": model[1].parameters()}, {"params": [model[0].bias]}])
    checkpointer = Checkpointer(model, str(tmp_path), optimizer=optimizer)
    checkpointer.record = make_record({"SEED": 7}, model, optimizer)
    checkpointer.save("model_final")
    path = str(tmp_path / "model_final.pth")
    assert read_record(path) == read_record(path + "?matching_heuristics=True")
    assert read_record(path) == {
        "config": {"SEED": 7},
        "optimizer": "SGD",
        "parameters": ["1.weight", "1.bias", "0.bias"],
    }


@pytest.mark.parametrize("record", [7, {"config": torch.ones(1)}, {"config": {1: 2}}])
def test_what_is_no_record(record: Any, tmp_path: Path) -> None:
    torch.save({"model": {}, "fpn_plugin": record}, tmp_path / "strange.pth")
    assert read_record(str(tmp_path / "strange.pth")) == {}


def test_files_without_a_record(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "broken.pth").write_bytes(OLD.read_bytes()[:-100])
    (tmp_path / "text.pth").write_text("no checkpoint")
    for path in (OLD, tmp_path / "gone.pth", *tmp_path.iterdir()):
        assert read_record(str(path)) == {}, path
