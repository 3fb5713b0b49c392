"""MODEL.BOTTOM_UP.WEIGHTS: what of a file goes into a network, and what the log says of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from networks import RESNET18, SMALL_SWIN, Case
from torch import Tensor, nn

from fpn_plugin.checkpoint.load import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_a_state_dict_loads(tmp_path: Path) -> None:
    state, target = network().state_dict(), network()
    content = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(content, tmp_path / "w.pth")
    assert load_weights(target, str(tmp_path / "w.pth")) == []
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in state.items())


def log_of(state: dict[str, Tensor], target: nn.Module, file: Path, caplog: Any) -> str:
    torch.save(state, file)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_weights(target, str(file))
    (record,) = caplog.records
    return f"{record.levelname} {record.getMessage().replace(str(file.parent), '')}"


def test_the_log_of_a_file_that_matches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {**network().state_dict(), "fc.weight": torch.zeros(1)}
    assert log_of(state, network(), tmp_path / "w.pth", caplog).splitlines() == [
        "INFO MODEL.BOTTOM_UP.WEIGHTS: /w.pth: all 6 tensors of the network are in the file",
        "  matched       6  0.weight, 0.bias, 1.weight, 1.bias, ...",
        "  left over     1  fc.weight (the classifier, which a pyramid does not use)",
    ]


def test_the_log_of_a_file_that_half_matches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = network().state_dict()
    del state["1.weight"]
    state = {f"backbone.{name}": value for name, value in state.items()}
    state |= {"backbone.extra.weight": torch.zeros(1), "roi_heads.x": torch.zeros(1)}
    assert log_of(state, network(), tmp_path / "w.pth", caplog).splitlines() == [
        "WARNING MODEL.BOTTOM_UP.WEIGHTS: /w.pth: only 5 of the network's 6 tensors are in the file"
        " (87.5% of its numbers); the others keep their initial values",
        "  matched       5  0.weight, 0.bias, 1.bias, 1.running_mean, ...",
        "  missing       1  1.weight",
        "  left over     1  backbone.extra.weight",
        "  left over     1  roi_heads.x (not below 'backbone.')",
    ]


def test_norms_without_statistics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {n: v for n, v in network().state_dict().items() if not n.startswith("1.running")}
    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))
    text = log_of(state, frozen, tmp_path / "w.pth", caplog)
    assert text.startswith("INFO") and "1.running_mean, 1.running_var (statistics of" in text
    assert torch.equal(frozen[1].running_var, torch.ones(4))
    assert log_of(state, network(), tmp_path / "w.pth", caplog).startswith("WARNING")


def test_nothing_matching_is_an_error(tmp_path: Path) -> None:
    torch.save({"x.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="nothing in .*w.pth matches.*x.weight.*0.weight"):
        load_weights(network(), str(tmp_path / "w.pth"))


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError,
        match=r"does not fit: 0.weight is \(4, 3, 3, 3\) in the file, \(4, 3, 1, 1\) in the"
        " network; 6 of the network's 7 tensors fit",
    ):
        load_weights(network(), str(tmp_path / "w.pth"))
    torch.save({f"model.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"0.weight \(model.0.weight\) is"):
        load_weights(network(), str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "model, args, tag",
    [
        ("test_convnext", {}, "stages_0"),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, "layers_0"),
    ],
)
def test_timms_whole_model_loads_into_its_feature_network(
    model: str, args: dict[str, Any], tag: str, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    whole = timm.create_model(model, **args)
    features = timm.create_model(model, features_only=True, **args)
    assert any(name.startswith(tag) for name in features.state_dict())
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    assert load_weights(features, str(tmp_path / "w.pth")) == []


@pytest.mark.parametrize(
    "naming, prefix", [("torchvision", ""), ("detectron2", "backbone.0.body.")]
)
def test_a_deeper_networks_file_is_a_warning(
    naming: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.resnet34().state_dict()
    state = {f"{prefix}{name}": torch.zeros(()).expand(x.shape) for name, x in shapes.items()}
    target = (
        torchvision.models.resnet18()
        if naming == "torchvision"
        else Case("build_resnet_backbone", keys=RESNET18).build()
    )
    text = log_of(state, target, tmp_path / "w.pth", caplog).splitlines()[0]
    assert text.startswith("WARNING") and "tensors of the network are in the file; it has 8" in text
    assert "8 more blocks in the stages that matched (layer1.2, layer2.2, layer2.3," in text
    assert "is it of a deeper network?" in text


def test_whole_stages_and_heads_that_are_left_over_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target: nn.Module = torchvision.models.resnet18()
    state = target.state_dict()
    del target.layer4, target.fc
    text = log_of(state, target, tmp_path / "w.pth", caplog)
    assert text.startswith("INFO") and "layer4.0.conv1.weight" in text
