"""A config and a checkpoint as a detector in evaluation mode."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Sequence

from detectron2.config import CfgNode

from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer
from fpn_plugin.checkpoint.record import read_record
from fpn_plugin.checkpoint.run_folder import CONFIG
from fpn_plugin.data.classes import adopt_classes
from fpn_plugin.data.coco_format import register_own
from fpn_plugin.data.keypoints import adopt_keypoints
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.described import load_model_config
from fpn_plugin.modeling.python_config import test_mapper
from fpn_plugin.modeling.speed import prepare_for_training

NO_WEIGHTS = "no weights: name a checkpoint by --weights or MODEL.WEIGHTS"
CONFIG_HELP = "of the model (default: that of the run that wrote --weights)"


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


def find_config(weights: str) -> str:
    """The config of the run that wrote a checkpoint: in the checkpoint, or config.yaml beside it.

    Returns:
        a path for `--config-file`: the checkpoint's own where its run recorded its config in it.

    Raises:
        FileNotFoundError: if there is none.
    """
    if "MODEL" in read_record(weights).get("config", {}):
        return weights
    path = os.path.join(os.path.dirname(weights), CONFIG)
    if "://" in weights or not os.path.isfile(path):
        places = "an address has none" if "://" in weights else f"neither it nor {path} has one"
        raise FileNotFoundError(f"--config-file: give the config of {weights}: {places}")
    return path


def read_config(
    path: str, weights: str, opts: Sequence[str], needed: Sequence[str] = ()
) -> CfgNode:
    """The config of a trained model, which knows the model's classes if its run recorded them.

    Args:
        path: of the config file, or a name; "" for the one of the run that wrote `weights`.
        weights: a checkpoint, in place of `MODEL.WEIGHTS`; "" for that.
        opts: `KEY VALUE` pairs.
        needed: the splits of `DATASETS.OWN` that must be there: TRAIN, VAL.

    Raises:
        FileNotFoundError: if the config or the checkpoint does not exist.
        ValueError: if no checkpoint is named, and for a bad value in the config.
    """
    _require_checkpoint(weights)
    if not path and not weights:
        raise ValueError(NO_WEIGHTS)
    path = path or find_config(weights)
    keys = ["MODEL.WEIGHTS", weights] if weights else []
    cfg = load_model_config(path, opts, keys, eval_only=True)
    checkpoint = cfg.MODEL.WEIGHTS
    if not checkpoint:
        raise ValueError(NO_WEIGHTS)
    _require_checkpoint(checkpoint)
    adopt_classes(cfg, checkpoint)
    adopt_keypoints(cfg, checkpoint)
    return register_own(cfg, needed=needed)


def _require_checkpoint(path: str) -> None:
    if path and "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"--weights (MODEL.WEIGHTS) {path!r}: there is no such file")


def load_detector(cfg: CfgNode, prefix: str = "", allow_partial: bool = False) -> Detector:
    """Build the model of a config, and load `MODEL.WEIGHTS` into it.

    Args:
        prefix: of the tensors' names that must be the checkpoint's; "" for all.
        allow_partial: go on where some are not.

    Raises:
        ValueError: naming the file, tensors and keys, if the checkpoint is of another model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # the checkpoint has the bottom-up weights, and the config has the pixel statistics already
    if not allow_partial:
        cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    cfg.MODEL.BOTTOM_UP.PIXELS = "config"
    cfg.MODEL.COMPILE = ""
    model = prepare_for_training(build_model(cfg), cfg).eval()
    StrictCheckpointer(model, prefix, allow_partial).load(cfg.MODEL.WEIGHTS)
    return Detector(cfg, model, test_mapper(cfg))
