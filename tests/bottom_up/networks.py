"""A small network of each source and family, as a config names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from helpers import zoo_config

from fpn_plugin.modeling.bottom_up import build_bottom_up

ALL = ("res2", "res3", "res4", "res5")


@dataclass(frozen=True)
class Case:
    """A bottom-up network.

    Attributes:
        args: MODEL.BOTTOM_UP.ARGS: most make the network small.
        keys: other keys of the config, of MODEL.
        maps: what it is asked for.
        divisibility: what it says that an image's sides must be divisible by.
        frozen_map: the last map that FREEZE_AT 2 leaves as it is after a step; "" for none.
        first: the first map that a step changes.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    maps: tuple[str, ...] = ALL
    divisibility: int = 0
    frozen_map: str = "res2"
    first: str = "res3"

    def __str__(self) -> str:
        return self.name

    def config(self, **keys: Any) -> CfgNode:
        """The config with this network underneath, on Detectron2's Faster R-CNN; `keys` are of
        MODEL, with __ for a dot."""
        given = {"BOTTOM_UP.NAME": self.name, "FPN.IN_FEATURES": list(self.maps)}
        given.update(self.keys)
        given.update({key.replace("__", "."): value for key, value in keys.items()})
        flat = [item for key, value in given.items() for item in (f"MODEL.{key}", value)]
        cfg = zoo_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", *flat)
        cfg.MODEL.BOTTOM_UP.ARGS.update(self.args)
        return cfg

    def build(self, **keys: Any) -> Backbone:
        """The network of :meth:`config`."""
        return build_bottom_up(self.config(**keys), ShapeSpec(channels=3))


ONE_MAP: dict[str, Any] = {"maps": ("res4",), "frozen_map": "", "first": "res4"}
NORM_ON_MAPS: dict[str, Any] = {"frozen_map": "", "first": "res2"}
RESNET18 = {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}
SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}

TIMM = [
    Case("timm/test_resnet"),
    Case("timm/resnext26ts"),
    Case("timm/test_convnext"),
    Case("timm/test_efficientnet"),
    Case("timm/mobilenetv3_small_050"),
    Case("timm/regnetx_002"),
    Case("timm/swin_tiny_patch4_window7_224", args=SMALL_SWIN, divisibility=4),
    # its res2 comes from all of its stages; FREEZE_AT counts those
    Case("timm/hrnet_w18_small", divisibility=32, frozen_map="", first="res2"),
    Case("timm/densenet121", args={"block_config": [2, 2, 2, 2], "growth_rate": 8}),
    Case("timm/ese_vovnet19b_slim_dw"),
    Case("timm/repvgg_a0"),
    Case("timm/ghostnet_050"),
    Case("timm/test_vit", **ONE_MAP),
]
TORCHVISION = [
    Case("torchvision/resnet18"),
    Case("torchvision/mobilenet_v3_small"),
    Case("torchvision/shufflenet_v2_x0_5"),
    Case("torchvision/regnet_x_400mf"),
    Case("torchvision/convnext_tiny"),
]
DETECTRON2 = [
    Case(
        "build_resnet_backbone",
        keys={**RESNET18, "RESNETS.NORM": "BN"},
    ),
    Case(
        "build_regnet_backbone",
        args={"stem_width": 8, "depth": 5, "w_a": 8.0, "w_0": 8, "w_m": 1.7, "group_width": 8},
    ),
    # the norm on each map learns with any FREEZE_AT: no pretrained network has it
    Case(
        "build_swin_backbone",
        args={"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
        **NORM_ON_MAPS,
    ),
    Case(
        "build_mvit_backbone",
        args={"embed_dim": 8, "depth": 5, "last_block_indexes": [0, 1, 3, 4]},
        **NORM_ON_MAPS,
    ),
    Case(
        "build_vit_backbone",
        args={"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 96, "window_size": 2}
        | {"window_block_indexes": [0, 1]},
        **ONE_MAP,
    ),
]
CASES = [*TIMM, *TORCHVISION, *DETECTRON2]
