"""Detectron2's RegNet, Swin, MViT and ViT by config: maps, arguments, freezing, odd sizes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.swin import SwinTransformer
from networks import DETECTRON2
from torch import nn

from fpn_plugin import PyramidBackbone, add_fpn_config
from fpn_plugin.bottom_up.detectron2 import Detectron2Backbone
from fpn_plugin.modeling.bottom_up import build_bottom_up

RGB = ShapeSpec(channels=3)
ALL = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SMALL = {case.name: case.args for case in DETECTRON2 if case.name != "build_resnet_backbone"}
STRIDES = {name: ALL for name in SMALL} | {
    "build_regnet_backbone": {"res1": 2, **ALL},
    "build_vit_backbone": {"res4": 16},
}
CHANNELS = {
    "build_regnet_backbone": [8, 8, 16, 24, 40],
    "build_swin_backbone": [8, 16, 32, 64],
    "build_mvit_backbone": [8, 16, 32, 64],
    "build_vit_backbone": [16],
}
EVERY = pytest.mark.parametrize("name", list(SMALL))


def config(name: str, freeze_at: int = 0, maps: Any = (), norm: str = "", **args: Any) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.BOTTOM_UP.NAME = name
    cfg.MODEL.BOTTOM_UP.NORM = norm
    cfg.MODEL.BOTTOM_UP.ARGS = CfgNode({**SMALL.get(name, {}), **args}, new_allowed=True)
    cfg.MODEL.FPN.IN_FEATURES = list(maps)
    return cfg


def build(name: str, *args: Any, **more: Any) -> Detectron2Backbone:
    backbone = build_bottom_up(config(name, *args, **more), RGB)
    assert isinstance(backbone, Detectron2Backbone)
    return backbone


def first_trainable(network: nn.Module) -> str:
    return next((name for name, p in network.named_parameters() if p.requires_grad), "")


@EVERY
def test_maps_are_the_class_s_own_with_the_shapes_that_were_promised(name: str) -> None:
    backbone = build(name).eval()
    shapes = backbone.output_shape()
    assert {key: shape.stride for key, shape in shapes.items()} == STRIDES[name]
    assert [shape.channels for shape in shapes.values()] == CHANNELS[name]
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        even, odd, own = backbone(x), backbone(torch.randn(1, 3, 97, 131)), backbone.model(x)
    assert all(torch.equal(a, b) for a, b in zip(own.values(), even.values(), strict=True))
    for maps, size in ((even, (64, 96)), (odd, (97, 131))):
        for y, shape in zip(maps.values(), shapes.values(), strict=True):
            assert list(y.shape[1:]) == [shape.channels, *(-(-s // shape.stride) for s in size)]
            assert y.isfinite().all()


@pytest.mark.parametrize("name", [name for name, strides in STRIDES.items() if len(strides) > 1])
def test_what_no_wanted_map_needs_is_not_built(name: str) -> None:
    torch.manual_seed(0)
    whole = build(name).eval()
    torch.manual_seed(0)
    part = build(name, 0, ["res3", "res4"]).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = part(x)
    assert list(maps) == list(part.output_shape()) == ["res3", "res4"]
    everything = whole(x)
    assert all(torch.equal(maps[key], everything[key]) for key in maps)
    assert set(part.state_dict()) < set(whole.state_dict())
    sum(y.square().mean() for y in maps.values()).backward()
    assert [key for key, p in part.named_parameters() if p.grad is None] == []


FREEZING = [
    ("build_regnet_backbone", ["stem.conv", "s1.", "s2.", "s3.", "s4.", ""]),
    (
        "build_swin_backbone",
        [
            "patch_embed.proj",
            "layers.0.blocks.0.",
            "layers.0.downsample.",
            "layers.1.downsample.",
            "layers.2.downsample.",
            "norm0.",
        ],
    ),
    (
        "build_mvit_backbone",
        ["patch_embed.proj", "blocks.0.", "blocks.1.", "blocks.2.", "blocks.4.", "scale2_norm."],
    ),
    ("build_vit_backbone", ["pos_embed", "blocks.0.", "blocks.0.", "blocks.0.", "", ""]),
]


@pytest.mark.parametrize(
    "name, freeze_at, first",
    [(name, level, first) for name, firsts in FREEZING for level, first in enumerate(firsts)],
)
def test_freezing_stops_at_the_level(name: str, freeze_at: int, first: str) -> None:
    network = build(name, freeze_at).model
    trainable = first_trainable(network)
    assert trainable.startswith(first) and bool(trainable) == bool(first)
    trained = [p.requires_grad for key, p in network.named_parameters() if "norm" not in key]
    assert trained == sorted(trained)  # frozen ones first, and no gap


def test_the_frozen_norms_are_frozen_as_detectron2_does() -> None:
    backbone = build("build_regnet_backbone", 2)
    frozen = {key[6:8] for key, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    assert frozen == {"st", "s1"}
    everywhere = build("build_regnet_backbone", 0, norm="FrozenBN")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in everywhere.modules())
    assert first_trainable(everywhere) == "model.stem.conv.weight"


def test_swin_starts_at_its_patches_stride() -> None:
    """The class itself says that the first map has stride 4, whatever its patches are."""
    backbone = build("build_swin_backbone", patch_size=2)
    assert {key: shape.stride for key, shape in backbone.output_shape().items()} == {
        f"res{i}": 2**i for i in range(1, 5)
    }
    assert backbone(torch.randn(1, 3, 33, 64))["res1"].shape[2:] == (17, 32)


def test_absolute_positions_of_swin_are_of_the_stem() -> None:
    network = build("build_swin_backbone", 1, ape=True).model
    assert isinstance(network, SwinTransformer)
    assert not network.absolute_pos_embed.requires_grad


@pytest.mark.parametrize("freeze_at", [0, 1, 2])
def test_checkpointing_behind_a_frozen_stem_keeps_the_gradients(freeze_at: int) -> None:
    torch.manual_seed(0)
    one = build("build_swin_backbone", freeze_at, drop_path_rate=0.0).train()
    torch.manual_seed(0)
    two = build("build_swin_backbone", freeze_at, drop_path_rate=0.0, use_checkpoint=True).train()
    x = torch.randn(1, 3, 64, 64)
    for backbone in (one, two):
        backbone(x)["res5"].square().mean().backward()
    for (key, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6), key


def test_regnet_takes_its_parts_by_name() -> None:
    backbone = build("build_regnet_backbone", 1, stem_class="ResStem", block_class="VanillaBlock")
    assert list(backbone.output_shape()) == ["res2", "res3", "res4", "res5", "res6"]
    assert first_trainable(backbone.model).startswith("s1.")


@pytest.mark.parametrize(
    "name, channels, millions",
    [
        ("build_regnet_backbone", [32, 80, 240, 560, 1360], 20.76),
        ("build_swin_backbone", [96, 192, 384, 768], 27.5),
        ("build_mvit_backbone", [96, 192, 384, 768], 23.4),
        ("build_vit_backbone", [768], 86.3),
    ],
)
def test_the_defaults_are_of_well_known_sizes(
    name: str, channels: list[int], millions: float
) -> None:
    cfg = config(name)
    cfg.MODEL.BOTTOM_UP.ARGS = CfgNode(new_allowed=True)
    backbone = build_bottom_up(cfg, RGB)
    assert [shape.channels for shape in backbone.output_shape().values()] == channels
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(millions * 1e6, rel=5e-3)


@torch.no_grad()
def test_a_plain_vit_has_a_map_after_each_block() -> None:
    whole = build("build_vit_backbone").eval()
    depth, x = len(whole.model.blocks), torch.randn(1, 3, 32, 64)
    passed: list[torch.Tensor] = []
    for block in whole.model.blocks:
        block.register_forward_hook(lambda module, inputs, y: passed.append(y.permute(0, 3, 1, 2)))
    assert torch.equal(whole(x)["res4"], passed[-1])
    for maps in (["res4_1", "res4"], ["res4_1"]):
        part = build("build_vit_backbone", maps=maps).eval()
        assert len(part.model.blocks) == (depth if "res4" in maps else 1)
        part.load_state_dict(whole.state_dict(), strict=False)
        assert all(
            torch.equal(y, passed[0 if name == "res4_1" else -1]) for name, y in part(x).items()
        )
    with pytest.raises(ValueError, match="IN_FEATURES: .* two of them are one map of build_vit"):
        build("build_vit_backbone", maps=[f"res4_{depth}", "res4"])


def test_a_pyramid_runs_on_a_plain_vit() -> None:
    cfg = config("build_vit_backbone", maps=["res4"])
    cfg.MODEL.FPN.TOPOLOGY, cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS = "simple", "LN", 16
    pyramid = PyramidBackbone(cfg, RGB)
    maps = pyramid(torch.randn(1, 3, 96, 64))
    assert {key: tuple(x.shape[2:]) for key, x in maps.items()} == {
        "p2": (24, 16),
        "p3": (12, 8),
        "p4": (6, 4),
        "p5": (3, 2),
        "p6": (2, 1),
    }


@pytest.mark.parametrize(
    "name, more, message",
    [
        (
            "build_swin_backbone",
            {"embed_dims": 8},
            "MODEL.BOTTOM_UP.ARGS of build_swin_backbone.*'embed_dims'.*mean 'embed_dim'.*depths",
        ),
        ("build_swin_backbone", {"frozen_stages": 2}, "ARGS.*'frozen_stages'.*drop_path_rate"),
        ("build_mvit_backbone", {"embed_dim": "wide"}, "MODEL.BOTTOM_UP.ARGS: .*'wide'.*mvit"),
        ("build_regnet_backbone", {"stem_class": "Stem"}, "ARGS.stem_class.*ResStem, SimpleStem"),
        ("build_regnet_backbone", {"w_0": 7}, "MODEL.BOTTOM_UP.ARGS: .*build_regnet_backbone"),
        ("build_vit_backbone", {"patch_size": 14}, "build_vit_backbone.*stride 14.*power of two"),
        ("build_vit_backbone", {"maps": ["res5"]}, "IN_FEATURES.*build_vit.*'res5'.*from: res4"),
        ("build_vit_backbone", {"norm": "FrozenBN"}, "MODEL.BOTTOM_UP.NORM: 'FrozenBN'.*LayerNorm"),
    ],
)
def test_mistakes_are_named(name: str, more: dict, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        build(name, **more)


@pytest.mark.parametrize("name", ["build_regnet_backbone", "build_swin_backbone"])
def test_images_of_other_channels(name: str) -> None:
    network = build_bottom_up(config(name), ShapeSpec(channels=4))
    assert list(network(torch.randn(1, 4, 64, 64))) == list(network.output_shape())


@pytest.mark.parametrize(
    "name, args, package, message",
    [
        ("build_vit_backbone", {}, "timm.models.layers", r"pip install 'fpn_plugin\[timm\]'"),
        ("build_mvit_backbone", {}, "timm.models.layers", r"pip install 'fpn_plugin\[timm\]'"),
        (
            "build_vit_backbone",
            {"use_act_checkpoint": True},
            "fairscale",
            "use_act_checkpoint.*pip install fairscale",
        ),
    ],
)
def test_missing_packages_are_named(
    name: str, args: dict, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        build(name, **args)
