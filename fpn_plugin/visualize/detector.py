"""A config and a checkpoint as a detector in evaluation mode."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from torch import nn

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.config import load_config
from fpn_plugin.config.resolve import choose_device
from fpn_plugin.data.coco_format import register_own
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.speed import prepare_for_training

Mapper = Callable[[dict[str, Any]], dict[str, Any]]  # from a record to the model's input


@dataclass(frozen=True)
class Detector:
    """A trained model, and the mapper of its inputs.

    Attributes:
        cfg: its config.
        model: in evaluation mode, in full precision, uncompiled.
        mapper: from a record to the model's input, as in an evaluation.
    """

    cfg: CfgNode
    model: Any
    mapper: Mapper


def read_config(path: str, weights: str, opts: Sequence[str]) -> CfgNode:
    """The config of a trained model.

    Args:
        weights: a checkpoint, in place of `MODEL.WEIGHTS`; "" for that.
        opts: `KEY VALUE` pairs.

    Raises:
        FileNotFoundError: if the config or the checkpoint does not exist.
        ValueError: if no checkpoint is named, and for a bad value in the config.
    """
    pairs = [*opts, "MODEL.WEIGHTS", weights] if weights else list(opts)
    cfg = load_config(argparse.Namespace(config_file=path, opts=pairs, eval_only=True))
    register_own(cfg)
    choose_device(cfg)
    checkpoint = cfg.MODEL.WEIGHTS
    if not checkpoint:
        raise ValueError("no weights: name a checkpoint by --weights or MODEL.WEIGHTS")
    if "://" not in checkpoint and not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"--weights (MODEL.WEIGHTS) {checkpoint!r}: there is no such file")
    return cfg


def load_detector(
    cfg: CfgNode, checkpointer: Callable[[nn.Module], Checkpointer] = Checkpointer
) -> Detector:
    """Build the model of a config, and load `MODEL.WEIGHTS` into it.

    Args:
        checkpointer: makes the checkpointer that loads them, given the model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # the checkpoint has the bottom-up weights, and the config has the pixel statistics already
    cfg.MODEL.BOTTOM_UP.WEIGHTS, cfg.MODEL.BOTTOM_UP.PIXELS = "", "config"
    cfg.MODEL.COMPILE = ""
    model = prepare_for_training(build_model(cfg), cfg).eval()
    checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return Detector(cfg, model, DatasetMapper(cfg, is_train=False))
