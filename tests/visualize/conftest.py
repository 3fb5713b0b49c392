"""A tiny Mask R-CNN and the pictures of a registered dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import scene_data
import torch
from detectron2.modeling import build_model
from torch import nn

from fpn_plugin.visualize.detector import read_config

CONFIG = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  MASK_ON: True
  BACKBONE: {NAME: build_pyramid_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN, OUT_FEATURES: [res2, res3, res4, res5]}
  BOTTOM_UP: {WEIGHTS: there-is-no-such-file.pth, PIXELS: config}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16, FUSE_TYPE: fast_normalized}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], POST_NMS_TOPK_TEST: 30}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 6}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, POOLER_RESOLUTION: 14}
INPUT: {MIN_SIZE_TEST: 120}
DATASETS: {TEST: [heads_val]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a checkpoint and pictures, of a registered dataset and others."""
    root = tmp_path_factory.mktemp("visualize")
    scene_data.register(root)
    (root / "config.yaml").write_text(CONFIG)
    cfg = read_config(str(root / "config.yaml"), str(root / "config.yaml"), [])
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    torch.save({"model": model.state_dict()}, root / "model.pth")
    (root / "other").mkdir()
    shutil.copy(root / "val0.png", root / "other" / "strange.PNG")
    return root
