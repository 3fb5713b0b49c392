"""Checkpoints as files of another pyramid: what a warm start does, and back to Detectron2's FPN."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from fpn_plugin.bottom_up.weight_files import read_state_dict
from fpn_plugin.engine.checkpoint import Checkpointer, write_atomically
from fpn_plugin.engine.run_folder import CONFIG, recorded_config
from fpn_plugin.engine.trainer import Trainer
from fpn_plugin.engine.warm_source import FROM, WEIGHTS, describe_checkpoint
from fpn_plugin.engine.warm_start import WarmStart

logger = logging.getLogger(__name__)

# What Detectron2's FPN can be told to be; any other value is none of its
_DETECTRON2 = {
    "TOPOLOGY": ("fpn",),
    "GRAPH": ([],),
    "REPEATS": (1,),
    "FUSE_TYPE": ("sum", "avg"),
    "UPSAMPLE": ("nearest",),
    "LATERAL": ("conv1x1",),
    "BLOCK": ("conv3x3",),
    "ACTIVATION": ("",),
    "NORM_EPS": (0.0,),
}


def check_output(output: str, *others: str) -> None:
    """Refuse to replace a file.

    Raises:
        FileExistsError: naming --output and the file.
    """
    for path in (Path(output), *(Path(output).with_name(name) for name in others)):
        if path.exists():
            raise FileExistsError(f"--output {output!r}: {path} exists; choose another folder")


def to_config(cfg: CfgNode, output: str) -> None:
    """Write what `MODEL.WEIGHTS` becomes in a config's model, with the config.yaml beside it.

    Args:
        cfg: resolved, with `MODEL.FPN.WARM_START`.

    Raises:
        FileExistsError: if one of the two files exists.
    """
    check_output(output, CONFIG)
    model = Trainer.build_model(cfg)
    adapt = WarmStart(model, cfg.MODEL.WEIGHTS)
    Checkpointer(model, adapt=adapt).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    _write(output, {"model": model.state_dict()})
    Path(output).with_name(CONFIG).write_text(cfg.dump())
    logger.info("Wrote %s and, beside it, the %s that it goes with (%s)", output, CONFIG, FROM)


def to_detectron2(weights: str, output: str) -> None:
    """Write a checkpoint of ours as one of Detectron2's own FPN.

    The names are the same; what is checked is that Detectron2 would compute the same from them.

    Raises:
        FileExistsError: if the file exists.
        ValueError: naming MODEL.WEIGHTS, the key and its value, where it would not.
    """
    check_output(output)
    where = f"{WEIGHTS} {weights!r} cannot become Detectron2's FPN"
    model = recorded_config(str(Path(weights).parent)).get("MODEL", {})
    if model.get("FPN", {}).get("WARM_START"):
        raise ValueError(f"{where}: it holds two pyramids (MODEL.FPN.WARM_START: True)")
    settings = describe_checkpoint(weights)
    for key, choices in _DETECTRON2.items():
        if settings[key] not in choices:
            valid = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{where}: MODEL.FPN.{key} is {settings[key]!r}, not {valid}")
    network = model.get("BOTTOM_UP", {}).get("NAME", "build_resnet_backbone")
    if network != "build_resnet_backbone":
        logger.warning("MODEL.BOTTOM_UP.NAME is %r, which Detectron2 has no FPN on", network)
    state: dict[str, Tensor] = read_state_dict(weights, WEIGHTS)
    _write(output, {"model": state, "__author__": "fpn_plugin"})
    logger.info("Wrote %s for MODEL.BACKBONE.NAME build_resnet_fpn_backbone", output)


def _write(output: str, data: dict[str, Any]) -> None:
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), lambda file: torch.save(data, file))
