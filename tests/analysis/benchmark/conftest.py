"""A detector that takes milliseconds, as Detectron2 has it and as this plugin does, and a benchmark
of it that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest

from fpn_plugin.analysis.benchmark import run
from fpn_plugin.analysis.benchmark.machine import ceilings
from fpn_plugin.analysis.benchmark.run import Settings, benchmark
from fpn_plugin.analysis.benchmark.timing import Plan
from fpn_plugin.analysis.report.bar import Bar

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


@pytest.fixture(scope="session", autouse=True)
def _small_matrices() -> Iterator[None]:
    """The machine's rates are beside the point here, and take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ceilings", lambda device: ceilings(device, sizes=[64], megabytes=1))
        yield


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the tiny configs: base (Detectron2's), fpn and bifpn (ours)."""
    folder: Path = tmp_path_factory.mktemp("benchmark")
    texts = {"base": BASE, "fpn": FPN, "bifpn": BIFPN}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in texts}


@pytest.fixture(scope="session")
def report(configs: dict[str, str]) -> dict[str, Any]:
    """Everything there is, on the tiny configs."""
    settings = Settings(
        files=[configs["fpn"], configs["bifpn"]],
        variants=["bf16: MODEL.CHANNELS_LAST True SOLVER.AMP.ENABLED True"],
        baseline=configs["base"],
        size=(64, 128),
        batch=2,
        what=["counts", "neck", "neck_train", "convs", "backbone", "inference", "train"],
        peers=["effdet", "detectron2", "torchvision"],
        plan=Plan(1, 1, 0.001, 0, max_spread=1e6),
    )
    return benchmark(settings, Bar(quiet=True))
