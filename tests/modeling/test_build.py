"""Detectors with heads that the plugin does not know, of OmegaConf's configs, and on a user's own networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.projects.point_rend import add_pointrend_config
from helpers import zoo_config
from omegaconf import OmegaConf
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone, resolve_config
from fpn_plugin.modeling.build import build_model

SMALL = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL += ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.BACKBONE.NAME", "build_pyramid_backbone"]
WITHOUT_P2 = ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
WITHOUT_P2 += ["MODEL.RPN.IN_FEATURES", ["auto"], "MODEL.ROI_HEADS.IN_FEATURES", ["auto"]]
WITHOUT_P2 += ["MODEL.ANCHOR_GENERATOR.SIZES", ["auto"]]
POINT_REND = {"NAME": "PointRendMaskHead", "POOLER_TYPE": "", "POINT_HEAD_ON": True}


class Mine(nn.Module):
    """A meta-architecture of a user's own, which keeps its config."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.cfg, self.names = cfg, cfg.MODEL.MINE.IN_FEATURES


if "Mine" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(Mine)


def config(*overrides: Any, path: str = "mask_rcnn_R_50_FPN_1x", **mask_head: Any) -> CfgNode:
    cfg = zoo_config(f"COCO-InstanceSegmentation/{path}.yaml", *SMALL)
    add_pointrend_config(cfg)
    cfg.MODEL.ROI_MASK_HEAD.update(mask_head)
    cfg.MODEL.MINE = CfgNode({"IN_FEATURES": ["p2", "own"]})
    cfg.merge_from_list(list(overrides))
    return resolve_config(cfg)


@pytest.mark.parametrize("mask_head", [{}, POINT_REND], ids=["unused", "p2"])
def test_heads_of_a_project_build(mask_head: dict) -> None:
    build_model(config(*([] if mask_head else WITHOUT_P2), **mask_head))


@pytest.mark.parametrize(
    "overrides, mask_head, message",
    [
        (WITHOUT_P2, POINT_REND, "MODEL.POINT_HEAD.IN_FEATURES: 'p2' is not among the maps"),
        (
            [*WITHOUT_P2, "MODEL.META_ARCHITECTURE", "Mine"],
            {},
            r"MODEL.MINE.IN_FEATURES: \['p2'\] are not among the backbone's maps: p3, p4, p5, p6",
        ),
        (["MODEL.META_ARCHITECTURE", "generalizedrcnn"], {}, "did you mean 'GeneralizedRCNN'"),
    ],
)
def test_a_head_that_reads_what_is_not_there(
    overrides: list, mask_head: dict, message: str
) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        build_model(config(*overrides, **mask_head))


def test_a_model_may_keep_its_config() -> None:
    model: Any = build_model(config("MODEL.META_ARCHITECTURE", "Mine"))
    assert model.names == ["p2", "own"]
    assert type(copy.deepcopy(model).cfg) is type(model.cfg.clone()) is CfgNode


@pytest.mark.parametrize("name", ["build_pyramid_backbone", "build_bottom_up_backbone"])
def test_an_omegaconf_config_builds_the_same(name: str) -> None:
    cfg = config("MODEL.BACKBONE.NAME", name) if "pyramid" in name else None
    if cfg is None:
        cfg = zoo_config("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "MODEL.BACKBONE.NAME", name)
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    states = []
    for given in (cfg, OmegaConf.create(cfg.dump())):
        torch.manual_seed(0)
        states.append(build_detectron2_model(given).backbone.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


class Own(Backbone):
    """A user's network: its last map is stretched to an even size, or loses a row."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.conv = nn.Conv2d(3, 8, 3, stride=32, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        if self.fault == "even":
            size = [(side + 1) // 2 * 2 for side in y.shape[2:]]
            y = nn.functional.interpolate(y, size=size)
        return {"res5": y[:, :, 1:] if self.fault == "lost" else y}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res5": ShapeSpec(channels=8, stride=32)}


@pytest.mark.parametrize("fault, divisor", [("", 0), ("even", 64), ("lost", -1)])
def test_a_network_of_ones_own_gives_maps_of_its_stride(fault: str, divisor: int) -> None:
    name = f"build_own_{fault}_backbone"
    if name not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register(name, lambda cfg, shape: Own(fault))
    cfg = zoo_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", *SMALL)
    cfg.MODEL.BOTTOM_UP.NAME, cfg.MODEL.FPN.IN_FEATURES = name, ["res5"]
    if divisor >= 0:
        assert build_backbone(cfg).size_divisibility == divisor
        return
    with pytest.raises(ValueError, match=f"BOTTOM_UP.NAME: {name} gives 'res5' of 2 x 5 for .*96"):
        build_backbone(cfg)
    pyramid = PyramidBackbone(Own(fault), in_features=["res5"])
    with pytest.raises(ValueError, match="Own gives 'res5' of 1 x 2 for an image of 64 x 64"):
        pyramid(torch.zeros(1, 3, 64, 64))
