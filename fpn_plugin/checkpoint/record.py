"""The record in a checkpoint: what it was made with, under the key "fpn_plugin".

It is plain data: "config", the run's config as nested dicts; "optimizer", the name of the
optimizer's class; "parameters", the names of its parameters in its order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fpn_plugin.checkpoint.plain import is_torch_file, read_plain

RECORD = "fpn_plugin"


def read_record(path: str) -> dict[str, Any]:
    """The record of a checkpoint file, whose tensors are not read.

    Args:
        path: of the file; the options that Detectron2 takes after it are ignored.

    Returns:
        {} for a checkpoint without a record: an older one, another program's, or none that can be
        read.
    """
    file = Path(path.partition("?")[0])
    if not file.is_file() or not is_torch_file(file):
        return {}
    try:
        content = read_plain(file, path, mmap=True)
    except ValueError:  # loading it says why
        return {}
    return record_of(content)


def record_of(checkpoint: Any) -> dict[str, Any]:
    """The record in what a checkpoint file holds; {} if there is none."""
    record = checkpoint.get(RECORD) if isinstance(checkpoint, Mapping) else None
    return record if isinstance(record, dict) and _is_plain(record) else {}


def make_record(
    config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The record of a run, for its checkpoints.

    Args:
        config: of :func:`plain_config`.
        model: the model itself, not a wrapper.
    """
    return {
        "config": config,
        "optimizer": optimizer_name(optimizer),
        "parameters": parameter_names(model, optimizer),
    }


def plain_config(cfg: CfgNode | DictConfig) -> dict[str, Any]:
    """A config as nested dicts of plain values; of what else is in it the name remains."""
    if isinstance(cfg, CfgNode):
        config: dict[str, Any] = yaml.safe_load(cfg.dump())
    else:
        config = _plain(OmegaConf.to_container(cfg, resolve=False))
    return config


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """The name of its class, without what Detectron2's clipping of gradients adds to it."""
    return type(optimizer).__name__.replace("WithGradientClip", "")


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters in its order; "" for one that is not the model's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return [names.get(id(parameter), "") for group in groups for parameter in group["params"]]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    name: str = _convert_target_to_string(named)
    return name


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
