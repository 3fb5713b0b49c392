"""Keys that are set and that nothing reads are errors; no config that is right is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from backbones import bifpn, toy_backbone
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from helpers import zoo_config
from omegaconf import OmegaConf

from fpn_plugin import add_fpn_config, resolve_config
from fpn_plugin.config.files import merge_config_file
from fpn_plugin.config.unread import refuse_unread_keys

ZOO = sorted(Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent.rglob("*.yaml"))
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OURS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "studies"]
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
PYRAMID = ("MODEL.BACKBONE.NAME", "build_pyramid_backbone")
ALONE = ("MODEL.BACKBONE.NAME", "build_bottom_up_backbone")
SAY = "[Ss]ay MODEL.BACKBONE.NAME: build_pyramid_backbone"
TIMM = ("MODEL.BOTTOM_UP.NAME", "timm/resnet18")


@pytest.mark.parametrize("files", [ZOO, OURS], ids=["detectron2", "ours"])
def test_no_config_that_comes_with_us_is_refused(files: list[Path]) -> None:
    assert len(files) > 40
    for path in files:
        cfg = get_cfg()
        add_fpn_config(cfg)
        if path.parent.name == "presets":  # parts of other configs
            cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
        merge_config_file(cfg, str(path))
        refuse_unread_keys(cfg)
        if path in ZOO and "fpn" in cfg.MODEL.BACKBONE.NAME:
            cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
            refuse_unread_keys(cfg)


@pytest.mark.parametrize(
    "path, keys, message",
    [
        (FASTER, ["MODEL.FPN.TOPOLOGY", "pafpn"], f"MODEL.FPN.TOPOLOGY: 'pafpn' is set.*{SAY}"),
        (FASTER, list(TIMM), f"MODEL.BOTTOM_UP.NAME: 'timm/resnet18' is set.*{SAY}"),
        (FASTER, ["MODEL.BOTTOM_UP.WEIGHTS", "a.pth"], f"BOTTOM_UP.WEIGHTS: 'a.pth'.*{SAY}"),
        (FASTER, ["MODEL.BOTTOM_UP.ARGS.depth", 1], rf"BOTTOM_UP.ARGS: {{'depth': 1}}.*{SAY}"),
        (FASTER, ["MODEL.BOTTOM_UP.NORM", "GN"], f"BOTTOM_UP.NORM: 'GN'.*{SAY}"),
        (FASTER, ["MODEL.FPN.EXTRA_LEVELS", "conv_p5"], f"EXTRA_LEVELS: 'conv_p5'.*{SAY}"),
        (FASTER, ["MODEL.FPN.RECOMPUTE", True], f"MODEL.FPN.RECOMPUTE: True is set.*{SAY}"),
        (FASTER, ["MODEL.FPN.FUSE_TYPE", "softmax"], f"FUSE_TYPE: 'softmax'.*{SAY}"),
        (RETINANET, ["MODEL.FPN.REPEATS", 3], f"retinanet_resnet_fpn_backbone is.*{SAY}"),
        (C4, ["MODEL.FPN.TOPOLOGY", "pafpn"], f"build_resnet_backbone is.*{SAY}"),
        (C4, ["MODEL.FPN.UPSAMPLE", "carafe"], f"FPN.UPSAMPLE: 'carafe' is set.*{SAY}"),
        (C4, list(TIMM), f"timm/resnet18' is set.*{SAY} .*build_bottom_up_backbone"),
        (C4, [*ALONE, "MODEL.FPN.TOPOLOGY", "pafpn"], f"TOPOLOGY: 'pafpn' is set.*{SAY}"),
        (C4, [*ALONE, "MODEL.FPN.FUSE_TYPE", "max"], f"FPN.FUSE_TYPE: 'max' is set.*{SAY}"),
        (
            FASTER,
            [*PYRAMID, "MODEL.FPN.WARM_START_FROM", {"TOPOLOGY": "fpn"}],
            "WARM_START_FROM: .*WARM_START is False. Say MODEL.FPN.WARM_START: True",
        ),
        (
            FASTER,
            [*PYRAMID, *TIMM, "MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NORM", "BN"],
            "RESNETS.DEPTH: 101, MODEL.RESNETS.NORM: 'BN' are set.*NAME: timm/resnet18 is no such",
        ),
        (
            FASTER,
            [*PYRAMID, "MODEL.BOTTOM_UP.NAME", "build_swin_backbone", "MODEL.RESNETS.DEPTH", 18],
            "MODEL.RESNETS.DEPTH: 18 is set.*build_swin_backbone is no such.*BOTTOM_UP.ARGS",
        ),
        (
            FASTER,
            [*PYRAMID, "MODEL.FPN.TOPOLOGY", "bifpn", "MODEL.FPN.GRAPH", [{"name": "p3"}]],
            "TOPOLOGY: 'bifpn' is set.*MODEL.FPN.GRAPH is the whole pyramid. Set .*GRAPH to",
        ),
        (
            RETINANET,
            ["MODEL.FCOS.NUM_CONVS", 2],
            "MODEL.FCOS.NUM_CONVS: 2 is set.*Say MODEL.META_ARCHITECTURE: FCOS",
        ),
    ],
)
def test_keys_that_nothing_reads(path: str, keys: list[Any], message: str) -> None:
    cfg = zoo_config(path)
    for key, value in zip(keys[::2], keys[1::2]):
        if key.startswith("MODEL.BOTTOM_UP.ARGS."):
            cfg.MODEL.BOTTOM_UP.ARGS[key.rpartition(".")[2]] = value
        else:
            cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        resolve_config(cfg)
    with pytest.raises(ValueError, match=message):  # for LazyConfig's users, too
        resolve_config(OmegaConf.create(cfg.dump()))


def test_what_is_set_for_a_builder_of_the_user_is_its_own_matter() -> None:
    def build_unread_backbone(cfg: Any, input_shape: Any) -> None: ...

    if "build_unread_backbone" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(build_unread_backbone)
    keys = [*TIMM, "MODEL.FPN.TOPOLOGY", "pafpn", "MODEL.RESNETS.DEPTH", 18]
    refuse_unread_keys(zoo_config(C4, "MODEL.BACKBONE.NAME", "build_unread_backbone", *keys))
    # nor are Detectron2's own keys, which base files set for all
    refuse_unread_keys(zoo_config(C4, "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 64))
    # nor is what the heads may read: this one has a ResNet's last stage
    refuse_unread_keys(zoo_config(C4, *ALONE, *TIMM, "MODEL.RESNETS.NORM", "BN"))
    with pytest.raises(KeyError, match="BACKBONE.NAME.*did you mean 'build_pyramid_backbone'"):
        refuse_unread_keys(zoo_config(C4, "MODEL.BACKBONE.NAME", "build_pyramids_backbone"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"topology": "pafpn", "downsample": "avgpool"}, "downsample: 'avgpool' is set, but noth"),
        ({"topology": "channel_mapper", "fuse_type": "max"}, "fuse_type: 'max'.*'channel_mapper'"),
        ({"upsample": "carafe", "topology": "channel_mapper"}, "upsample: 'carafe'.*res2, res3"),
        ({"graph": bifpn(1), "lateral": "conv3x3"}, "lateral: 'conv3x3'.*no part of `graph`"),
    ],
)
def test_an_operator_that_no_part_of_the_pyramid_has_is_named(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        toy_backbone(**arguments)
    if "graph" not in arguments:
        toy_backbone(**{**arguments, "topology": "bifpn"})  # which reads them all
