"""Checkpoints of detectors: other libraries' names, other image channels, and what they lack."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Sequence

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from helpers import zoo_config
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.load import load_weights

FASTER, RETINA = (
    f"COCO-Detection/{name}_R_50_FPN_1x.yaml" for name in ("faster_rcnn", "retinanet")
)
SMALL = {
    "BACKBONE.NAME": "build_pyramid_backbone",
    "BACKBONE.FREEZE_AT": 0,
    "RESNETS.DEPTH": 18,
    "RESNETS.RES2_OUT_CHANNELS": 64,
    "ROI_BOX_HEAD.FC_DIM": 16,
}


def detector(config: str = FASTER, **keys: Any) -> Any:
    """A small one on ResNet-18; `keys` are of MODEL, with __ for a dot."""
    given = {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}
    flat = [item for key, value in given.items() for item in (f"MODEL.{key}", value)]
    torch.manual_seed(0)
    return build_model(zoo_config(config, *flat)).eval()


def torchvision_backbone(levels: Sequence[int], top: Any = None, norm: Any = None) -> nn.Module:
    """torchvision's ResNet-18 with its FPN, with statistics that count."""
    network = BackboneWithFPN(
        torchvision.models.resnet18(weights=None),
        {f"layer{level}": f"{level}" for level in levels},
        [64 * 2 ** (level - 1) for level in levels],
        256,
        top or LastLevelMaxPool(),
        norm,
    )
    for x in network.state_dict().values():
        if x.is_floating_point() and x.ndim == 1:
            nn.init.uniform_(x, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(
    "config, keys, levels, top, norm",
    [
        (FASTER, {}, (1, 2, 3, 4), None, None),
        (FASTER, {"BOTTOM_UP__NAME": "torchvision/resnet18"}, (1, 2, 3, 4), None, None),
        (FASTER, {"FPN__NORM": "BN"}, (1, 2, 3, 4), None, nn.BatchNorm2d),
        (RETINA, {"FPN__EXTRA_LEVELS": "conv_p5"}, (2, 3, 4), LastLevelP6P7(256, 256), None),
        (RETINA, {"FPN__EXTRA_LEVELS": "conv_c5"}, (2, 3, 4), LastLevelP6P7(512, 256), None),
    ],
    ids=["faster_rcnn", "adapted_network", "norm_as_v2", "p6_of_p5", "p6_of_c5"],
)
def test_torchvisions_detectors_load_as_network_and_pyramid(
    config: str,
    keys: dict[str, Any],
    levels: tuple[int, ...],
    top: Any,
    norm: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs, model = torchvision_backbone(levels, top, norm), detector(config, **keys)
    state = {f"backbone.{name}": x for name, x in theirs.state_dict().items()}
    # of the same names and shapes, but of other classes
    state |= {n: x + 1 for n, x in model.state_dict().items() if "box_predictor" in n}
    torch.save(state, tmp_path / "model.pth")
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(str(tmp_path / "model.pth"))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, expected = model.backbone(image), theirs(image)
    assert all(torch.equal(x, y) for x, y in zip(ours.values(), expected.values()))
    (record,) = [r for r in caplog.records if "of the model's" in r.getMessage()]
    head = "proposal_generator (6), roi_heads.box_head (4), roi_heads.box_predictor (4)"
    assert record.levelname == "INFO" and "left over" not in record.getMessage()
    assert (
        f"start anew: {head if config == FASTER else 'head.cls_subnet (8)'}" in record.getMessage()
    )


def as_mmdetections(name: str) -> str:
    """The name that MMDetection has for a tensor of torchvision's backbone."""
    words = name.split(".")
    if words[0] == "body":
        return ".".join(["backbone", *words[1:]])
    lists = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}
    if words[1] in lists:
        return f"neck.{lists[words[1]]}.{words[2]}.conv.{words[4]}"
    return f"neck.fpn_convs.{int(words[2][1]) - 3}.conv.{words[3]}"


def test_mmdetections_names(tmp_path: Path) -> None:
    theirs = torchvision_backbone((2, 3, 4), LastLevelP6P7(256, 256))
    state = {as_mmdetections(name): x for name, x in theirs.state_dict().items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "model.pth")
    model = detector(RETINA, FPN__EXTRA_LEVELS="conv_p5")
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, expected = model.backbone(image), theirs(image)
    assert all(torch.equal(x, y) for x, y in zip(ours.values(), expected.values()))


def frozen_norms(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": getattr(norm, leaf)
        for name, norm in model.named_modules()
        if isinstance(norm, FrozenBatchNorm2d)
        for leaf in ("running_mean", "running_var")
    }


def test_a_checkpoint_resets_no_statistics_that_it_lacks(tmp_path: Path) -> None:
    model, file = detector(), str(tmp_path / "model.pth")
    for x in frozen_norms(model).values():
        nn.init.uniform_(x, 0.5, 1.5)
    before = {name: x.clone() for name, x in frozen_norms(model).items()}
    assert len(before) == 40
    state = {n: x for n, x in model.state_dict().items() if not n.startswith("backbone.bottom_up")}
    torch.save({"model": dict(state)}, file)  # without the version of a state dict
    Checkpointer(model).load(file)
    assert all(torch.equal(x, before[name]) for name, x in frozen_norms(model).items())
    stem = {"stem.conv1.weight": model.backbone.bottom_up.stem.conv1.weight.detach()}
    torch.save(stem, file)
    load_weights(model.backbone.bottom_up, file)
    assert all(torch.equal(x, before[name]) for name, x in frozen_norms(model).items())
    # the affine of a norm alone, as in Caffe2's files, has its statistics in it
    affine = {f"res2.0.conv1.norm.{leaf}": torch.ones(64) for leaf in ("weight", "bias")}
    torch.save({**stem, **affine}, file)
    load_weights(model.backbone.bottom_up, file)
    norm = "backbone.bottom_up.res2.0.conv1.norm."
    after = frozen_norms(model)
    assert (
        not after.pop(f"{norm}running_mean").any() and after.pop(f"{norm}running_var").eq(1).all()
    )
    assert all(torch.equal(x, before[name]) for name, x in after.items())


def test_a_file_of_which_nothing_or_little_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = detector(ROI_HEADS__NUM_CLASSES=3), str(tmp_path / "model.pth")
    state = model.state_dict()
    network = {
        n.removeprefix("backbone.bottom_up."): x for n, x in state.items() if "bottom_up" in n
    }
    for names, advice in ((network, "go to MODEL.BOTTOM_UP.WEIGHTS"), ({"a.b": torch.ones(1)}, "")):
        torch.save(names, file)
        with pytest.raises(ValueError, match=f"MODEL.WEIGHTS '{file}': nothing .*{advice}"):
            Checkpointer(model).load(file)
    with pytest.raises(ValueError, match="has a.b, the model has backbone.*, proposal_generator"):
        Checkpointer(model).load(file)
    torch.save({n: x for n, x in state.items() if "bottom_up" in n}, file)
    with caplog.at_level(logging.INFO, "fpn_plugin"):
        Checkpointer(model).load(file)
        torch.save({n: x for n, x in state.items() if "stem" in n or "output2" in n}, file)
        Checkpointer(model).load(file)
        torch.save(detector().state_dict(), file)
        Checkpointer(model).load(file)
    usual, little, classes = [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "fpn_plugin.checkpoint.fit"
    ]
    assert usual[0] == "INFO" and "start anew: backbone.fpn_lateral2 (2), " in usual[1]
    assert little[0] == "WARNING" and "7 of the model's 130 tensors are in it (4.1%" in little[1]
    assert "cls_score.weight ((81, 16) in it, (4, 16) in the model)" in classes[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_detector_for_other_image_channels_starts_from_one_for_rgb(
    channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt_input_conv = pytest.importorskip("timm.models").adapt_input_conv
    rgb, file = detector(), str(tmp_path / "model.pth")
    torch.save(rgb.state_dict(), file)
    pixels = {"PIXEL_MEAN": [100.0] * channels, "PIXEL_STD": [50.0] * channels}
    model = detector(**pixels)
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(file)
    before, after = (x.backbone.bottom_up.stem.conv1.weight.detach() for x in (rgb, model))
    assert torch.equal(after, adapt_input_conv(channels, before.clone()))
    assert "the three input channels of backbone.bottom_up.stem.conv1.weight are" in caplog.text
