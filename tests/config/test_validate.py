"""A config without this plugin's keys, with a misspelt one, of another library, or for what Detectron2 lacks."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from helpers import zoo_config
from omegaconf import OmegaConf

from fpn_plugin import PyramidBackbone, resolve_config
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.modeling.fcos import FCOS
from fpn_plugin.modeling.speed import speed_of

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
DEFORMABLE = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]


def config(*overrides: Any) -> CfgNode:
    return zoo_config(FASTER, "MODEL.BACKBONE.NAME", "build_pyramid_backbone", *overrides)


def named(name: str) -> Callable[[CfgNode], Any]:
    def build(cfg: CfgNode) -> Any:
        cfg.MODEL.BACKBONE.NAME = name
        return build_backbone(cfg)

    return build


@pytest.mark.parametrize(
    "call",
    [
        named("build_pyramid_backbone"),
        named("build_bottom_up_backbone"),
        lambda cfg: PyramidBackbone(cfg, ShapeSpec(channels=3)),
        FCOS,
        resolve_config,
        Trainer,
        speed_of,
    ],
)
def test_a_config_without_our_keys_says_what_to_call(call: Callable[[CfgNode], Any]) -> None:
    with pytest.raises(ValueError, match=r"lacks MODEL.FPN.TOPOLOGY .*add_fpn_config\(cfg\)"):
        call(get_cfg())


def test_a_misspelt_attribute_is_named() -> None:
    cfg = config()
    cfg.MODEL.FPN.TOPOLGY = "bifpn"
    with pytest.raises(ValueError, match="MODEL.FPN.TOPOLGY: 'bifpn' .*mean MODEL.FPN.TOPOLOGY"):
        resolve_config(cfg)
    cfg = config()
    cfg.MODEL.FPN.MY_OWN = 3
    resolve_config(cfg)


def test_an_omegaconf_config_is_resolved_in_place() -> None:
    auto = ["MODEL.RPN.IN_FEATURES", ["auto"], "MODEL.FPN.TOPOLOGY", "bifpn"]
    cfg = OmegaConf.create(config(*auto).dump())
    assert resolve_config(cfg) is cfg
    assert cfg.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            [*DEFORMABLE, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
            "DEFORM_ON_PER_STAGE: .* build_resnet_fpn_backbone needs .*build_pyramid_backbone",
        ),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"], "PROPOSAL_GENERATOR.NAME: RRPN needs Detectr"),
    ],
)
def test_what_is_not_compiled_is_refused(
    overrides: list, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        resolve_config(config(*overrides))
