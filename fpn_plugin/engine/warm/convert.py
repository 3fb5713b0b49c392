"""Converts checkpoint files: to another pyramid, as a warm start does, or to Detectron2's FPN."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from fpn_plugin.checkpoint.checkpointer import write_atomically
from fpn_plugin.checkpoint.files import read_state_dict
from fpn_plugin.checkpoint.run_folder import CONFIG
from fpn_plugin.config.warm_start import FROM, WEIGHTS, describe_checkpoint, recorded_model
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.engine.warm.start import start_warm

logger = logging.getLogger(__name__)

# the values of MODEL.FPN that Detectron2's FPN can have
_DETECTRON2_FPN = {
    "TOPOLOGY": ("fpn",),
    "GRAPH": ([],),
    "REPEATS": (1,),
    "FUSE_TYPE": ("sum", "avg"),
    "UPSAMPLE": ("nearest",),
    "LATERAL": ("conv1x1",),
    "BLOCK": ("conv3x3",),
    "ACTIVATION": ("",),
    "NORM_EPS": (0.0,),
    "EXTRA_LEVELS": ("maxpool", "conv_c5"),
    "RFP_STEPS": (1,),
}


def check_output(output: str, weights: str, with_config: bool, overwrite: bool) -> None:
    """Check that the output replaces no file.

    Args:
        with_config: whether a config.yaml is written beside it.
        overwrite: allows to replace files, except for those of the checkpoint itself.

    Raises:
        FileExistsError: naming --output and the file.
        ValueError: naming --output, if it would replace a file that belongs to `weights`.
    """
    files = [Path(output), *([Path(output).with_name(CONFIG)] if with_config else [])]
    inputs = {Path(weights).resolve(), Path(weights).with_name(CONFIG).resolve()}
    for file in files:
        if file.resolve() in inputs:
            raise ValueError(
                f"--output {output!r}: {file} belongs to --weights; take another folder"
            )
        if file.exists() and not overwrite:
            raise FileExistsError(
                f"--output {output!r}: {file} exists; give --overwrite or take another folder"
            )


def to_config(cfg: CfgNode, output: str) -> None:
    """Write `MODEL.WEIGHTS`, converted for a config's model, and that config.yaml beside it.

    Args:
        cfg: resolved, with `MODEL.FPN.WARM_START`.

    Raises:
        ValueError: as :func:`start_warm` does.
    """
    model = Trainer.build_model(cfg)
    start_warm(model, cfg)
    _write(output, {"model": model.state_dict()})
    text = cfg.dump()
    write_atomically(Path(output).with_name(CONFIG), lambda file: file.write(text.encode()))
    logger.info("Wrote %s and, beside it, the %s that it goes with (%s)", output, CONFIG, FROM)


def to_detectron2(weights: str, output: str) -> None:
    """Write a checkpoint of this plugin's plain `fpn` as one of Detectron2's FPN.

    Names are the same; the config is checked for whether Detectron2 computes the same from them.

    Raises:
        ValueError: naming MODEL.WEIGHTS, the key and its value, if it does not.
    """
    where = f"{WEIGHTS} {weights!r} cannot become Detectron2's FPN"
    model = recorded_model(weights)
    if model.get("FPN", {}).get("WARM_START"):
        raise ValueError(f"{where}: it holds two pyramids (MODEL.FPN.WARM_START: True)")
    settings = describe_checkpoint(weights)
    for key, choices in _DETECTRON2_FPN.items():
        if key in settings and settings[key] not in choices:
            valid = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{where}: MODEL.FPN.{key} is {settings[key]!r}, not {valid}")
    network = model.get("BOTTOM_UP", {}).get("NAME", "build_resnet_backbone")
    if network != "build_resnet_backbone":
        raise ValueError(
            f"{where}: MODEL.BOTTOM_UP.NAME is {network!r}, not 'build_resnet_backbone', which its"
            " FPN stands on"
        )
    _write(output, {"model": read_state_dict(weights, WEIGHTS), "__author__": "fpn_plugin"})
    builder = "retinanet_resnet" if settings["EXTRA_LEVELS"] == "conv_c5" else "resnet"
    name = f"build_{builder}_fpn_backbone"
    logger.info("Wrote %s for MODEL.BACKBONE.NAME %s", output, name)


def _write(output: str, data: dict[str, Any]) -> None:
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), lambda file: torch.save(data, file))
