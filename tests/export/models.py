"""Small models to export: a pyramid on a tiny ResNet, and tiny detectors as files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from helpers import levels_of, randomize

from fpn_plugin import PyramidBackbone, add_fpn_config, resolve_config
from fpn_plugin.export.export import Settings, _exported_part, _load
from fpn_plugin.export.formats import FORMATS
from fpn_plugin.export.model import ExportModel, export_backbone
from fpn_plugin.report.progress import Bar

# a parameter per format; one whose packages are not installed here is skipped
EVERY_FORMAT = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(package) is None for package in format.packages),
            reason=f"the packages of {name} are not installed",
        ),
    )
    for name, format in FORMATS.items()
]

DETECTORS = {
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "keypoint_rcnn": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
}
SMALL: dict[str, Any] = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_pyramid_backbone",
    "MODEL.RESNETS.NORM": "BN",
    # small numbers: scores are neither 0 nor 1 with random weights
    "MODEL.PIXEL_STD": [1000.0] * 3,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.01,
}


def tiny_resnet() -> ResNet:
    """Widths 8, 16, 24, 32, one block each."""
    stages, width = [], 8
    for number in range(4):
        stride, out = [1 if number == 0 else 2], 8 * (number + 1)
        more = {"stride_per_block": stride, "norm": "BN"}
        stages.append(ResNet.make_stage(BasicBlock, 1, in_channels=width, out_channels=out, **more))
        width = out
    return ResNet(BasicStem(3, 8, norm="BN"), stages, out_features=["res2", "res3", "res4", "res5"])


def tiny_subject(topology: str = "fpn", levels: int = 4, **style: Any) -> ExportModel:
    """A pyramid of width 16 on its last `levels` maps, with random weights."""
    features = list(levels_of(topology))[-levels:]
    arguments = {"in_features": features, "out_channels": 16, "topology": topology, **style}
    pyramid = PyramidBackbone(tiny_resnet(), **arguments)
    return export_backbone(get_cfg(), SimpleNamespace(backbone=randomize(pyramid)))


def write_detector(folder: Path, name: str, **overrides: Any) -> tuple[str, str]:
    """A detector with random weights: its config file and its checkpoint."""
    cfg: CfgNode = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(DETECTORS[name]))
    values = {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}}
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    resolve_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    for key, parameter in model.named_parameters():
        if "fpn_" in key or "predictor" in key or key.startswith("head"):
            torch.nn.init.normal_(parameter, std=0.1)
    config, weights = folder / f"{name}.yaml", folder / f"{name}.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return str(config), str(weights)


def eager_model(settings: Settings) -> ExportModel:
    """What `export` writes to a file, before it does."""
    return _exported_part(settings, _load(settings, Bar(quiet=True)))
