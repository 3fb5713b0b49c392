"""MODEL.BOTTOM_UP.WEIGHTS: what loads, what is refused, and that no code of a file runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import zoo_config
from torch import nn

from fpn_plugin.bottom_up import build_bottom_up
from fpn_plugin.bottom_up.weights import load_weights, read_state_dict


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_a_state_dict_loads_wrapped_or_not(wrapper: str, tmp_path: Path) -> None:
    source, target = network(), network()
    state = source.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "w.pth")
    load_weights(target, str(tmp_path / "w.pth"))
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in state.items())


def test_what_is_missing_and_left_over_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = network().state_dict()
    del state["1.weight"]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        load_weights(network(), str(tmp_path / "w.pth"))
    text = caplog.text
    assert "6 tensors matched" in text
    assert "1 tensors of the network are not in the file: 1.weight" in text
    assert "1 tensors of the file are not used: head.weight" in text


def test_nothing_matching_is_an_error(tmp_path: Path) -> None:
    torch.save({"x.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="nothing in .*w.pth matches.*x.weight.*0.weight"):
        load_weights(network(), str(tmp_path / "w.pth"))


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"0.weight is \(4, 3, 3, 3\) in the file, \(4, 3, 1, 1\) in"
    ):
        load_weights(network(), str(tmp_path / "w.pth"))


class Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def test_a_file_with_code_runs_none_of_it(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"0.weight": Payload(str(marker))}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        read_state_dict(str(tmp_path / "w.pth"))
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_other_contents_are_an_error(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(str(tmp_path / "w.pth"))


def test_a_missing_file_names_the_key_and_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
    with pytest.raises(
        FileNotFoundError, match="MODEL.BOTTOM_UP.WEIGHTS.*'w.pth'.*/somewhere/w.pth"
    ):
        read_state_dict("w.pth")


def test_a_file_below_the_datasets_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pth")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert "0.weight" in read_state_dict("w.pth")


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            ["NAME", "build_resnet_backbon"],
            "MODEL.BOTTOM_UP.NAME.*did you mean 'build_resnet_backbone'",
        ),
        (["NORM", "FrozenBN"], "MODEL.BOTTOM_UP.NORM: 'FrozenBN' is for timm networks"),
    ],
)
def test_builder_mistakes_are_named(keys: list[str], message: str) -> None:
    cfg = zoo_config(
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", f"MODEL.BOTTOM_UP.{keys[0]}", keys[1]
    )
    with pytest.raises((KeyError, ValueError), match=message):
        build_bottom_up(cfg, ShapeSpec(channels=3))
