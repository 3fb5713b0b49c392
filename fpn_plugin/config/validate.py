"""Checks of a config: that it has this plugin's keys, those of `MODEL.FPN` and of the pixels, and
what Detectron2 lacks; and the keys in the errors of a pyramid."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import re
from contextlib import contextmanager
from typing import Any, Iterator

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.config.defaults import ARGS, plugin_keys
from fpn_plugin.config.settings import SECTION, pyramid_keys, read_settings
from fpn_plugin.registry import ArgumentError, UnknownNameError, close_name, unknown_name

logger = logging.getLogger(__name__)

DEFORMABLE = "MODEL.RESNETS.DEFORM_ON_PER_STAGE"
# Detectron2's own builders, beside BOTTOM_UP.NAME
RESNET_BUILDERS = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
)
# What computes with rotated boxes
_ROTATED = {
    "PROPOSAL_GENERATOR": ("NAME", "RRPN"),
    "ROI_HEADS": ("NAME", "RROIHeads"),
    "ROI_BOX_HEAD": ("POOLER_TYPE", "ROIAlignRotated"),
}
# Those in which every key is this plugin's, or Detectron2's
_OWN_SECTIONS = (
    *("MODEL.FPN", "MODEL.BOTTOM_UP", "MODEL.FCOS", "MODEL.EMA", "INPUT.LSJ", "INPUT.COPY_PASTE"),
    *("SOLVER.DDP", "DATASETS.OWN"),
)
# of Detectron2's own formats, and those of Pillow's that have 8 bits and that it converts to
_CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "L": 1, "LA": 2}
_CHANNELS |= {"HSV": 3, "YCbCr": 3, "CMYK": 4, "RGBA": 4}
_OTHER_ARGUMENTS = {"warm_from": "WARM_START_FROM"}


@contextmanager
def keys_in_errors() -> Iterator[None]:
    """Let the errors of a pyramid, which speak of its arguments, name the keys of `MODEL.FPN`.

    `extra_levels: ...` becomes `MODEL.FPN.EXTRA_LEVELS: ...`, and so do the arguments that stand
    between backquotes in the message.
    """
    try:
        yield
    except (ArgumentError, UnknownNameError) as error:
        keys = {key.lower(): f"{SECTION}.{key}" for key in pyramid_keys()}
        keys |= {name: f"{SECTION}.{key}" for name, key in _OTHER_ARGUMENTS.items()}
        first = re.match(r"\w*", error.argument)[0]  # type: ignore[index]
        if first not in keys:
            raise
        text = keys[first] + str(error)[len(first) :]
        text = re.sub(r"`(\w+)`", lambda match: keys.get(match[1], match[0]), text)
        raise type(error)(text) from error


class RecordingConfig(CfgNode):
    """A copy of a config that notes which keys are read.

    This plugin's own functions read the config itself: see :func:`plugin_config`.
    """

    def __init__(
        self, cfg: CfgNode, prefix: str = "", values_read: dict[str, Any] | None = None
    ) -> None:
        dict.__init__(self)
        self.__dict__.update(vars(cfg))
        values_read = {} if values_read is None else values_read
        self.__dict__.update(_whole=cfg, _prefix=prefix, _values_read=values_read)
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                value = RecordingConfig(value, f"{prefix}{key}.", values_read)
            dict.__setitem__(self, key, value)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, CfgNode):
            vars(self)["_values_read"][vars(self)["_prefix"] + key] = value
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def values_read(self) -> dict[str, Any]:
        """The values that were read, by their keys, with dots."""
        return vars(self)["_values_read"]

    def clone(self) -> CfgNode:
        """A copy of the config itself, which notes nothing."""
        return vars(self)["_whole"].clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> CfgNode:
        return copy.deepcopy(vars(self)["_whole"], memo)


def plugin_config(cfg: CfgNode | DictConfig) -> CfgNode:
    """The config itself as yacs's class, with every key of this plugin.

    Args:
        cfg: an OmegaConf config is copied; Detectron2 takes one as well.

    Raises:
        ValueError: naming a key that is missing and what to call, or a key beside this plugin's
            that is spelt nearly as one of them: setting an attribute makes one.
    """
    if isinstance(cfg, RecordingConfig):
        cfg = vars(cfg)["_whole"]
    node = cfg if isinstance(cfg, CfgNode) else _as_node(cfg)
    missing = [key for key in plugin_keys() if not _has(node, key)]
    if missing:
        more = f" and {len(missing) - 1} more of fpn_plugin's keys" if len(missing) > 1 else ""
        raise ValueError(
            f"the config lacks {missing[0]}{more}: call fpn_plugin.add_fpn_config(cfg) right after"
            " detectron2.config.get_cfg(), before files and options are merged"
        )
    for section in _OWN_SECTIONS:
        _refuse_misspelt(node, section)
    return node


def _as_node(cfg: DictConfig) -> CfgNode:
    node = CfgNode(OmegaConf.to_container(cfg, resolve=True))
    if _has(node, ARGS):
        node.MODEL.BOTTOM_UP.ARGS.set_new_allowed(True)
    return node


def _has(node: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _refuse_misspelt(cfg: CfgNode, section: str) -> None:
    node: Any = cfg
    for part in section.split("."):
        node = node[part]
    known = [key[len(section) + 1 :] for key in plugin_keys() if key.startswith(f"{section}.")]
    for key in node:
        if key not in known and (close := close_name(key, known, 0.8)):
            raise ValueError(
                f"{section}.{key}: {node[key]!r} is set, but there is no such key; did you mean"
                f" {section}.{close}?"
            )


def validate_config(cfg: CfgNode) -> None:
    """Check the keys of `MODEL.FPN` that can be checked without building anything, and those of
    the pixels: :func:`check_pixels`.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and the choices.
    """
    cfg = plugin_config(cfg)
    check_pixels(cfg)
    with keys_in_errors():
        read_settings(cfg).check()


def deformable_stages(cfg: CfgNode) -> bool:
    """Whether `MODEL.RESNETS` asks for deformable convolutions.

    Raises:
        ValueError: naming the key, if it is not a boolean for each stage, or the ResNet has no
            bottlenecks.
    """
    stages, depth = cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE, cfg.MODEL.RESNETS.DEPTH
    is_list = isinstance(stages, (list, tuple)) and len(stages) == 4
    if not is_list or not all(isinstance(stage, bool) for stage in stages):
        raise ValueError(
            f"{DEFORMABLE}: {stages!r} is not four booleans, of res2, res3, res4 and res5"
        )
    if any(stages) and depth < 50:
        raise ValueError(
            f"{DEFORMABLE}: {list(stages)}, but a ResNet of MODEL.RESNETS.DEPTH {depth} has no"
            " bottlenecks, whose 3x3 convolutions these are: take a depth from 50 on"
        )
    return any(stages)


def require_compiled_operators(cfg: CfgNode) -> None:
    """Refuse what only Detectron2's compiled operators compute, where they are not there.

    Raises:
        ValueError: naming the key, its value and what to take instead.
    """
    if importlib.util.find_spec("detectron2._C"):
        return
    missing = "needs Detectron2's compiled operators, which this installation lacks"
    name = cfg.MODEL.BACKBONE.NAME
    if name in RESNET_BUILDERS and any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise ValueError(
            f"{DEFORMABLE}: {list(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)} under"
            f" MODEL.BACKBONE.NAME: {name} {missing}: take build_pyramid_backbone (without a"
            " pyramid build_bottom_up_backbone), which computes the same by torchvision's"
        )
    for section, (key, value) in _ROTATED.items():
        if cfg.MODEL[section][key] == value:
            raise ValueError(f"MODEL.{section}.{key}: {value} {missing}: build it from its source")


def check_pixels(cfg: CfgNode) -> None:
    """Check that `MODEL.PIXEL_MEAN` and `MODEL.PIXEL_STD` fit the channels of `INPUT.FORMAT`.

    With an `INPUT.FORMAT` of "", for a mapper of one's own, they only have to fit each other.

    Raises:
        KeyError: for an unknown `INPUT.FORMAT`.
        ValueError: naming the key and the value.
    """
    order = cfg.INPUT.FORMAT
    if order and order not in _CHANNELS:
        raise unknown_name("INPUT.FORMAT", order, _CHANNELS)
    channels = _CHANNELS[order] if order else len(cfg.MODEL.PIXEL_MEAN)
    name = f"INPUT.FORMAT {order}" if order else "MODEL.PIXEL_MEAN"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = list(cfg.MODEL[key])
        if len(values) != channels:
            one = " (INPUT.FORMAT L is for gray images)" if len(values) == 1 else ""
            raise ValueError(
                f"MODEL.{key} {values} has {len(values)} value{'s' * (len(values) != 1)}, but"
                f" {name} has {channels} channel{'s' * (channels != 1)}: give a value"
                f" for each channel{one}; INPUT.FORMAT '' is for a mapper of your own"
            )
        is_number = [isinstance(x, (int, float)) and math.isfinite(x) for x in values]
        if not all(is_number) or (key == "PIXEL_STD" and min(values) <= 0):
            wanted = "positive numbers" if key == "PIXEL_STD" else "numbers"
            raise ValueError(f"MODEL.{key} {values}: must be {wanted}, in grey levels of 0 to 255")
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if order != "YUV-BT.601" and max(mean) <= 1 and max(std) < 1:
        logger.warning(
            "MODEL.PIXEL_MEAN %s and MODEL.PIXEL_STD %s look like values for pixels of 0 to 1, but"
            " pixels are 0 to 255 here: multiply them by 255",
            *(list(mean), list(std)),
        )
