"""Building a detector, and the maps that its heads read: those of sections that this plugin does
not know too, a project's or a user's own."""

from __future__ import annotations

import re
from typing import Any, Iterable

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.utils.registry import Registry
from torch import nn

from fpn_plugin.config.heads import AUTO_KEYS
from fpn_plugin.config.settings import is_names
from fpn_plugin.config.unread import refuse_unread_keys
from fpn_plugin.config.validate import RecordingConfig, plugin_config
from fpn_plugin.modeling.bottom_up import accept_small_maps
from fpn_plugin.modeling.python_config import attached, build_part
from fpn_plugin.registry import HOW_TO_ADD, UnknownNameError, unknown_name

# Names of a pyramid's or a network's maps. Others are of a head's own, and say nothing here
_MAP = re.compile(r"(p|res)\d+")
_UNREGISTERED = re.compile(r"No object named '(.*)' found in '(.*)' registry")
_SUFFIX, _BOTTOM_UP = "IN_FEATURES", "MODEL.FPN.IN_FEATURES"


def build_model(cfg: CfgNode) -> nn.Module:
    """Detectron2's `build_model`, with a check of the maps that the heads read.

    Which keys are read is seen while the model is built: a section that no head reads may say
    anything. Where a Python config is attached, what it says is built instead.

    Raises:
        ValueError: (KeyError for an unknown meta-architecture) naming the key, its value and the
            maps that there are.
    """
    python = attached(cfg)
    if python is not None:
        model: nn.Module = build_part(python, "model", bool(cfg.MODEL.BOTTOM_UP.WEIGHTS))
        return model.to(cfg.MODEL.DEVICE)
    cfg = plugin_config(cfg)
    name, known = cfg.MODEL.META_ARCHITECTURE, [name for name, _ in META_ARCH_REGISTRY]
    if name not in known:
        raise unknown_name("MODEL.META_ARCHITECTURE", name, known, advice=HOW_TO_ADD)
    refuse_unread_keys(cfg)
    recording = RecordingConfig(cfg)
    try:
        model = build_detectron2_model(recording)
    except KeyError as error:
        if cause := _missing_map(recording, error) or _unknown_name(recording, error):
            raise cause from error
        raise
    accept_small_maps(model)
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    maps = list(dict.fromkeys(key for each in backbones for key in each.output_shape()))
    for key, names in _features_read(recording):
        missing = [name for name in names if _MAP.fullmatch(name) and name not in maps]
        if missing and maps:
            raise ValueError(
                f"{key}: {missing} are not among the backbone's maps: {', '.join(maps)}"
            )
    return model


def _features_read(cfg: RecordingConfig) -> Iterable[tuple[str, list[str]]]:
    """The keys that name maps and were read, with their values."""
    for key, value in cfg.values_read().items():
        if key.endswith(_SUFFIX) and key != _BOTTOM_UP and is_names(value):
            yield key, list(value)


def _unknown_name(cfg: RecordingConfig, error: KeyError) -> UnknownNameError | None:
    """The error in the place of that of one of Detectron2's registries; None if it is another."""
    match = _UNREGISTERED.match(str(error.args[0]) if error.args else "")
    if not match:
        return None
    name, registry = match.groups()
    where = [key for key, value in cfg.values_read().items() if value == name]
    registries = [each for each in vars(modeling).values() if isinstance(each, Registry)]
    choices = [choice for each in registries if each._name == registry for choice, _ in each]
    return unknown_name(" or ".join(where) or registry, name, choices, advice=HOW_TO_ADD)


def _missing_map(cfg: RecordingConfig, error: KeyError) -> ValueError | None:
    """The error in the place of a bare `KeyError: 'p2'`; None if it is about something else."""
    name = error.args[0] if error.args else None
    keys = [key for key, names in _features_read(cfg) if name in names and key not in AUTO_KEYS]
    if not keys or not isinstance(name, str):
        return None
    return ValueError(
        f"{' or '.join(keys)}: {name!r} is not among the maps that the head gets: the backbone's,"
        " and for a head of boxes those of MODEL.ROI_HEADS.IN_FEATURES alone,"
        f" {list(cfg.MODEL.ROI_HEADS.IN_FEATURES)}"
    )


def score_threshold(cfg: CfgNode) -> tuple[str, float]:
    """The key of the lowest score that a model's detections have, and its value.

    Returns:
        "" and 0 for a model that has no such key known here.
    """
    keys = {
        "GeneralizedRCNN": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "PanopticFPN": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "RetinaNet": "MODEL.RETINANET.SCORE_THRESH_TEST",
        "FCOS": "MODEL.FCOS.SCORE_THRESH_TEST",
    }
    node: Any = cfg
    key = keys.get(cfg.MODEL.META_ARCHITECTURE, "")
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    return (key, float(node)) if node is not None else ("", 0.0)
