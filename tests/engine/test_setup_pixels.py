"""From the command line to a config: the pixels of what a run, or one that starts from it, begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from folders import DATA, run_setup

from fpn_plugin.checkpoint.run_folder import recorded_config
from fpn_plugin.engine.setup import argument_parser, begin, setup

FEATURES = ["res2", "res3", "res4", "res5"]
PYRAMID = (
    *("DATASETS.CHECK", "off", "MODEL.FPN.IN_FEATURES", str(FEATURES)),
    *("MODEL.RPN.IN_FEATURES", "[ auto ]", "MODEL.ROI_HEADS.IN_FEATURES", "auto"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
    *("MODEL.BACKBONE.NAME", "build_pyramid_backbone", "MODEL.BOTTOM_UP.NAME"),
)
RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB")


def pixels(cfg: CfgNode) -> tuple[list[float], list[float], str]:
    return list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT


@pytest.fixture
def finished(dataset: Path, tmp_path: Path, log: Any) -> Path:
    """The folder of a run with torchvision's pixels, as its start and its end leave it."""
    weights = tmp_path / "w.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, weights)
    opts = (*PYRAMID, "torchvision/resnet18", "MODEL.BOTTOM_UP.WEIGHTS", str(weights))
    run = tmp_path / "run"
    args = argument_parser().parse_args(["OUTPUT_DIR", str(run), *opts, *DATA])
    begin(setup(args), args)
    torch.save({}, run / "model_final.pth")
    assert recorded_config(str(run))["INPUT"]["FORMAT"] == "RGB"
    log.clear()
    return run


@pytest.mark.parametrize("kind", ["evaluated", "resumed", "resumed evaluation", "fine-tuned"])
@pytest.mark.parametrize("weights", ["", "gone.pth"])
def test_what_starts_from_a_run_has_its_pixels(
    weights: str, kind: str, finished: Path, tmp_path: Path, log: Any
) -> None:
    flags = ["--eval-only"] if "eval" in kind else []
    flags += ["--resume"] if "resumed" in kind else []
    folder = finished if "resumed" in kind else tmp_path / "other"
    opts = ["OUTPUT_DIR", str(folder), *PYRAMID, "torchvision/resnet18", *DATA]
    final = str(finished / "model_final.pth")
    opts += [] if "resumed" in kind else ["MODEL.WEIGHTS", final]
    opts += ["MODEL.BOTTOM_UP.WEIGHTS", weights]
    args = argument_parser().parse_args([*flags, *opts])
    cfg = setup(args)
    assert pixels(cfg) == RGB and "taken from the run's config of" in log.text
    assert "differs" not in log.text
    log.clear()
    started = begin(cfg, args)
    assert pixels(started) == RGB and "taken from the run's config of" in log.text
    assert (started.MODEL.BOTTOM_UP.PIXELS == "config") is (kind != "fine-tuned")
    if not weights:
        build_backbone(started)


def test_a_checkpoint_without_its_runs_config_is_a_warning(finished: Path, log: Any) -> None:
    (finished / "config.yaml").unlink()
    opts = [*PYRAMID, "torchvision/resnet18", "MODEL.WEIGHTS", str(finished / "model_final.pth")]
    cfg = run_setup("--eval-only", "OUTPUT_DIR", str(finished), *opts, *DATA)
    assert cfg.INPUT.FORMAT == "BGR"
    assert [r.levelname for r in log.records if "is not known" in r.message] == ["WARNING"]


def test_the_log_of_a_run_says_where_the_pixels_come_from(tmp_path: Path, log: Any) -> None:
    opts = [*PYRAMID, "torchvision/resnet18", "MODEL.BOTTOM_UP.WEIGHTS", "torchvision"]
    args = argument_parser().parse_args(["OUTPUT_DIR", str(tmp_path / "run"), *opts, *DATA])
    cfg = setup(args)
    log.clear()
    begin(cfg, args)  # it is what writes to the log file
    (line,) = [r.message for r in log.records if r.name == "fpn_plugin.config.pixels"]
    assert line.endswith("taken from torchvision's transforms of resnet18")
