"""MODEL.BOTTOM_UP: every source by config, its weights and norms, and a network without a pyramid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from networks import DETECTRON2, RESNET18, Case
from torch import nn

from fpn_plugin.modeling.bottom_up import LIBRARIES, build_bottom_up

RGB = ShapeSpec(channels=3)
R18 = Case("build_resnet_backbone", keys=RESNET18)
TIMM = Case("timm/test_resnet")
REGNET = next(case for case in DETECTRON2 if case.name == "build_regnet_backbone")


def norm_classes(module: nn.Module) -> set[str]:
    return {type(m).__name__ for m in module.modules() if "Norm" in type(m).__name__}


@pytest.mark.parametrize(
    "freeze_at, key, norm, frozen, trained",
    [
        (2, "BOTTOM_UP__NORM", "FrozenBN", "FrozenBatchNorm2d", "FrozenBatchNorm2d"),
        (2, "BOTTOM_UP__NORM", "BN", "FrozenBatchNorm2d", "BatchNorm2d"),
        (2, "BOTTOM_UP__NORM", "SyncBN", "FrozenBatchNorm2d", "SyncBatchNorm"),
        (2, "BOTTOM_UP__NORM", "GN", "GroupNorm", "GroupNorm"),
        (1, "RESNETS__NORM", "BN", "FrozenBatchNorm2d", "BatchNorm2d"),  # Detectron2's own key
        (0, "BOTTOM_UP__NORM", "BN", "", "BatchNorm2d"),
    ],
)
def test_norms_of_detectron2_s_networks(
    freeze_at: int, key: str, norm: str, frozen: str, trained: str
) -> None:
    network: Any = R18.build(BACKBONE__FREEZE_AT=freeze_at, **{key: norm})
    stages = [network.stem, network.res2, network.res3, network.res4, network.res5]
    for number, stage in enumerate(stages, start=1):
        is_frozen = number <= freeze_at
        assert norm_classes(stage) == {frozen if is_frozen else trained}
        assert {p.requires_grad for p in stage.parameters()} == {not is_frozen}


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_published_weights_are_asked_for(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def adapter(model: str, **settings: Any) -> nn.Module:
        given.update(settings, model=model)
        return nn.Identity()

    monkeypatch.setitem(LIBRARIES, library, adapter)
    Case(f"{library}/resnet18", args={"a": 1}).build(BOTTOM_UP__WEIGHTS=library)
    assert given == {
        "model": "resnet18",
        "out_features": ["res2", "res3", "res4", "res5"],
        "freeze_at": 2,
        "norm": "",
        "in_channels": 3,
        "args": {"a": 1},
        "pretrained": True,
    }


@pytest.mark.parametrize(
    "source, builder, prefix, first",
    [
        (R18, "build_pyramid_backbone", "backbone.bottom_up.", "gone.pth"),
        (R18, "build_bottom_up_backbone", "backbone.", "gone.pth"),
        (TIMM, "build_pyramid_backbone", "backbone.bottom_up.", "timm"),
    ],
)
def test_first_weights_are_not_read_where_a_whole_checkpoint_follows(
    source: Case, builder: str, prefix: str, first: str, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    state = {prefix + name: x for name, x in source.build().state_dict().items()}
    file = str(tmp_path / "model.pth")
    keys = {"BACKBONE__NAME": builder, "WEIGHTS": file, "BOTTOM_UP__WEIGHTS": first}
    torch.save({"model": state, "optimizer": {}}, file)
    torch.manual_seed(0)
    network = source.build(**keys)
    assert f"WEIGHTS {first} is not read: MODEL.WEIGHTS {file} has them" in caplog.text
    torch.manual_seed(0)
    expected = source.build().state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in network.state_dict().items())
    # part of the network is not enough, nor is the network under other names
    for partial in (dict(list(state.items())[:-2]), {f"x.{n}": x for n, x in state.items()}):
        torch.save(partial, file)
        with pytest.raises(FileNotFoundError, match="gone.pth"):
            source.build(**{**keys, "BOTTOM_UP__WEIGHTS": "gone.pth"})


@pytest.mark.parametrize("source", [R18, Case("torchvision/resnet18"), REGNET], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_weights_for_rgb_start_a_network_for_other_channels(
    source: Case, channels: int, tmp_path: Path
) -> None:
    adapt_input_conv = pytest.importorskip("timm.models").adapt_input_conv
    rgb = source.build()
    torch.save(rgb.state_dict(), tmp_path / "w.pth")
    shape = ShapeSpec(channels=channels)
    network = build_bottom_up(source.config(BOTTOM_UP__WEIGHTS=str(tmp_path / "w.pth")), shape)
    network(torch.randn(1, channels, 64, 64))
    (stem, *_), (expected, *_) = network.parameters(), rgb.parameters()
    assert torch.equal(stem, adapt_input_conv(channels, expected.detach().clone()))
    with pytest.raises(ValueError, match="images of 3 channels, not 1"):
        build_bottom_up(Case("torchvision/googlenet").config(), ShapeSpec(channels=1))


@pytest.mark.parametrize(
    "source, keys, message",
    [
        (
            R18,
            {"BOTTOM_UP__WEIGHTS": "timm"},
            "WEIGHTS: 'timm' are the weights that timm publishes.*'build_resnet_backbone'.*a file",
        ),
        (TIMM, {"BOTTOM_UP__WEIGHTS": "torchvision"}, "'torchvision' are.*'timm/test_resnet'"),
        (Case("timm"), {"BOTTOM_UP__WEIGHTS": "timm"}, "take timm/<model>"),
        (Case("timm"), {}, "MODEL.BOTTOM_UP.NAME: unknown name 'timm'.*timm/<model>, torchvision/"),
        (Case("tim/test_resnet"), {}, "did you mean 'timm/test_resnet'.*build_swin_backbone"),
        (Case("timm/resnet5o"), {}, "did you mean 'timm/resnet50'"),
        (Case("timm/resnet50.a1_in1kk"), {}, "did you mean 'timm/resnet50.a1_in1k'"),
        (Case("torchvision/resnet5o"), {}, "did you mean 'torchvision/resnet50'"),
        (Case("swin_t"), {}, "unknown name 'swin_t' .did you mean 'torchvision/swin_t'"),
        (Case("build_resnet_backbon"), {}, "did you mean 'build_resnet_backbone'"),
        (Case("build_pyramid_backbone"), {}, "'build_pyramid_backbone' is a value of MODEL.BACKB"),
        (Case("build_resnet_fpn_backbone"), {}, "'build_resnet_fpn_backbone' is a value of MODEL"),
        (Case("build_bottom_up_backbone"), {}, "'build_bottom_up_backbone' is a value of MODEL.B"),
        (
            Case("build_resnet_backbone", args={"depth": 18}),
            {},
            r"MODEL.BOTTOM_UP.ARGS: {'depth': 18}: build_resnet_backbone.*MODEL.RESNETS' \(DEFORM",
        ),
        (R18, {"BOTTOM_UP__NORM": "XN"}, "MODEL.BOTTOM_UP.NORM: unknown name 'XN'"),
        (R18, {"BOTTOM_UP__NORM": "BN", "RESNETS__NORM": "GN"}, "no batch norms.*GroupNorm"),
    ],
)
def test_mistakes_are_named(source: Case, keys: dict[str, Any], message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        source.build(**keys)


def alone(source: Case, rpn: list[str], roi_heads: list[str]) -> CfgNode:
    cfg = source.config(BACKBONE__NAME="build_bottom_up_backbone")
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES = rpn, roi_heads
    return cfg


@pytest.mark.parametrize(
    "source", [R18, TIMM, Case("torchvision/resnet18"), Case("timm/test_vit")], ids=str
)
def test_a_network_without_a_pyramid_gives_what_the_heads_read(source: Case) -> None:
    cfg = alone(source, ["res4"], ["res4"])
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    network = build_backbone(cfg, RGB)
    assert list(network.output_shape()) == list(network(torch.randn(1, 3, 64, 64))) == ["res4"]
    assert cfg.MODEL.FPN.IN_FEATURES == in_features


def test_the_heads_together_say_which_maps_are_given() -> None:
    network = build_backbone(alone(TIMM, ["res5"], ["res3", "res4"]), RGB)
    assert list(network.output_shape()) == ["res3", "res4", "res5"]


@pytest.mark.parametrize(
    "rpn, roi_heads, message",
    [
        (["p4"], ["res4"], r"MODEL.RPN.IN_FEATURES: \['p4'\] are not among the backbone's maps"),
        (["p4"], ["p4"], r"MODEL.RPN.IN_FEATURES: \['p4'\] are not among"),
        (["res6"], ["res4"], "maps of timm/test_resnet.*'res6'.*res1, res2"),
        (["auto"], ["res4"], "MODEL.RPN.IN_FEATURES: 'auto' is not resolved"),
    ],
)
def test_maps_that_the_heads_cannot_read(
    rpn: list[str], roi_heads: list[str], message: str
) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        build_backbone(alone(TIMM, rpn, roi_heads), RGB)
