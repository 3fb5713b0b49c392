"""A detector that takes milliseconds, as Detectron2 has it and as this plugin does."""

from __future__ import annotations

from pathlib import Path

BASE = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  MASK_ON: True
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 5}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [128], [256]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    PRE_NMS_TOPK_TEST: 100
    POST_NMS_TOPK_TEST: 50
    PRE_NMS_TOPK_TRAIN: 100
    POST_NMS_TOPK_TRAIN: 50
    BATCH_SIZE_PER_IMAGE: 32
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    NUM_CLASSES: 4
    BATCH_SIZE_PER_IMAGE: 16
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 8, POOLER_RESOLUTION: 14}
TEST: {DETECTIONS_PER_IMAGE: 10}
VERSION: 2
"""
FPN = """
_BASE_: base.yaml
MODEL: {BACKBONE: {NAME: build_pyramid_backbone}}
"""
BIFPN = """
_BASE_: fpn.yaml
MODEL:
  FPN:
    TOPOLOGY: bifpn
    REPEATS: 2
    FUSE_TYPE: fast_normalized
    BLOCK: separable
    NORM: BN
    NORM_EPS: 0.001
    NORM_MOMENTUM: 0.01
"""


def write_configs(folder: Path) -> dict[str, str]:
    """Paths of the tiny configs: base (Detectron2's), fpn and bifpn (ours)."""
    texts = {"base": BASE, "fpn": FPN, "bifpn": BIFPN}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in texts}
