"""A plain ViT with the spatial tuning adapter, by config. Its values: tests/parity/test_sta.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from fpn_plugin import add_fpn_config
from fpn_plugin.bottom_up.sta import SpatialTuningBackbone
from fpn_plugin.bottom_up.timm import TimmBackbone

RGB = ShapeSpec(channels=3)


def config(maps: list[str], sta: Any, **args: Any) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_pyramid_backbone", 0
    cfg.MODEL.BOTTOM_UP.NAME, cfg.MODEL.BOTTOM_UP.PIXELS = "timm/test_vit", "config"
    cfg.MODEL.BOTTOM_UP.ARGS = CfgNode({"sta": sta, **args}, new_allowed=True)
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = maps, 8
    return cfg


@pytest.mark.parametrize("maps", [["res3", "res4", "res5"], ["res3", "res5"], ["res3"]])
def test_any_pyramid_stands_on_it(maps: list[str], tmp_path: Path) -> None:
    vit = TimmBackbone("test_vit", ["res4_6"])
    torch.save(vit.model.model.state_dict(), tmp_path / "vit.pth")
    cfg = config(maps, {"blocks": [2, 4, 6], "channels": 4, "norm": "GN"})
    cfg.MODEL.BOTTOM_UP.WEIGHTS = str(tmp_path / "vit.pth")
    backbone = build_backbone(cfg, RGB)
    network = backbone.bottom_up
    first = network.network.model.model.blocks[0].mlp.fc1.weight
    assert torch.equal(first, vit.model.model.blocks[0].mlp.fc1.weight)
    channels = {"res3": 64 + 8, "res4": 64 + 16, "res5": 64 + 16}
    shapes = {name: shape.channels for name, shape in network.output_shape().items()}
    assert shapes == {name: channels[name] for name in maps}
    for size in ((97, 131), (32, 64)):
        found = backbone(torch.randn(2, 3, *size))
        for name in maps:
            stride = 2 ** int(name[3:])
            assert found[f"p{name[3:]}"].shape == (2, 8, *(-(-side // stride) for side in size))
    sum(x.square().mean() for x in found.values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "maps, sta, message",
    [
        (["res4"], 16, r"ARGS.sta: 16 is not a mapping such as {blocks: \[4, 8, 12\]}"),
        (["res4"], {}, r"ARGS.sta: blocks: \(\); give the numbers of three blocks"),
        (["res4"], {"blocks": [2, 4]}, r"ARGS.sta: blocks: \[2, 4\]; give the numbers of three"),
        (["res4"], {"blocks": [2, 4, 7]}, None),
        (["res5"], {"blocks": [2, 4, 7]}, "maps of timm/test_vit.*'res4_7'.*res4_6"),
        (["res4"], {"block": [2, 4, 6]}, "ARGS.sta: unknown name 'block'.*did you mean 'blocks'"),
        (["res2", "res3"], {"blocks": [2, 4, 6]}, "maps of the adapter.*'res2'.*res3, res4, res5"),
        (["res3"], {"blocks": [2, 4, 6], "channels": 0}, "channels: 0 is not a whole number"),
        (["res3"], {"blocks": [2, 4, 6], "norm": "XN"}, "ARGS.sta: norm: unknown name 'XN'.*BN"),
        (["res3", "res4"], {"blocks": [4, 2, 6]}, "blocks: .4, 2, 6.*from the.*first to the last"),
    ],
)
def test_mistakes_are_named(maps: list[str], sta: Any, message: str | None) -> None:
    if message is None:  # only the maps that are read are built
        build_backbone(config(maps, sta), RGB)
        return
    with pytest.raises((KeyError, ValueError), match=message):
        build_backbone(config(maps, sta), RGB)


def test_it_goes_on_any_network_with_maps_of_one_stride_and_scripts() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 16, stride=16)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.conv(x)
            return {"a": y, "b": y + 1}

        def output_shape(self) -> dict[str, ShapeSpec]:
            return {name: ShapeSpec(channels=4, stride=16) for name in "ab"}

        size_divisibility = 16

    backbone: Any = SpatialTuningBackbone(Patches(), 2, out_features=["res3", "res4"]).eval()
    x = torch.randn(1, 3, 64, 96)
    scripted = torch.jit.script(backbone)
    assert all(torch.equal(scripted(x)[name], y) for name, y in backbone(x).items())
    assert backbone.size_divisibility == 16
    with pytest.raises(ValueError, match="the network gives a, b for res3, res4, res5; it needs"):
        SpatialTuningBackbone(Patches())
