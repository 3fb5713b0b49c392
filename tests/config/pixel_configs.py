"""Configs whose pixels are resolved, and what was made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

from fpn_plugin import add_fpn_config
from fpn_plugin.config.pixels import resolve_pixels

DEFAULT = ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], "BGR")
FAIR = ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395], "BGR")
RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB")
HALF = ([127.5] * 3, [127.5] * 3, "RGB")
QUICKSTART = ([127.0] * 3, [128.0] * 3, "RGB")
MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def config(name: str = "build_resnet_backbone", weights: str = "", *others: Any) -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.BOTTOM_UP.NAME, cfg.MODEL.BOTTOM_UP.WEIGHTS = name, weights
    cfg.merge_from_list(list(others))
    return cfg


def pixels(cfg: CfgNode) -> tuple[list[float], list[float], str]:
    return list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT


def stating(values: tuple[list[float], list[float], str]) -> list[Any]:
    keys = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT")
    return [item for pair in zip(keys, values) for item in pair]


def resolved(cfg: CfgNode, log: pytest.LogCaptureFixture) -> str:
    """Resolve, and give the one line of the log with its level."""
    log.clear()
    resolve_pixels(cfg)
    (record,) = log.records
    return f"{record.levelname} {record.getMessage()}"


def weight_file(folder: Path, *names: str) -> str:
    torch.save({name: torch.zeros(1) for name in names}, folder / "w.pth")
    return str(folder / "w.pth")
