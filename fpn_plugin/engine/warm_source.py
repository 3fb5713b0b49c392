"""What pyramid a checkpoint has, for `MODEL.FPN.WARM_START`: from its run, or from its names."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Mapping

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from fpn_plugin.bottom_up.weight_files import read_state_dict
from fpn_plugin.config import PYRAMID_KEYS, add_fpn_config, pyramid_settings
from fpn_plugin.engine.run_folder import recorded_config

logger = logging.getLogger(__name__)

KEY, FROM, WEIGHTS = "MODEL.FPN.WARM_START", "MODEL.FPN.WARM_START_FROM", "MODEL.WEIGHTS"
_OURS = "build_pyramid_backbone"
_FPN = re.compile(r"backbone\.fpn_(lateral|output)(\d+)\.(weight|bias|norm\..+)")
_TOP = re.compile(r"backbone\.top_block\.p\d+\.(weight|bias)")


def resolve_warm_start(cfg: CfgNode, checkpoint: str = "", evaluates: bool = False) -> None:
    """Fill `MODEL.FPN.WARM_START_FROM`, in place, where `WARM_START` is on and it is empty.

    Args:
        checkpoint: of the run that goes on, if one does: it is loaded as it is.
        evaluates: whether `MODEL.WEIGHTS` is loaded as it is too.

    Raises:
        FileNotFoundError: if there is no such file as `MODEL.WEIGHTS`.
        ValueError: naming the key and its value, if the checkpoint's pyramid cannot be told, or
            does not go with this config.
    """
    fpn = cfg.MODEL.FPN
    if not fpn.WARM_START:
        return
    if cfg.MODEL.BACKBONE.NAME != _OURS:
        raise ValueError(
            f"{KEY}: True starts a pyramid of ours, but MODEL.BACKBONE.NAME is"
            f" {cfg.MODEL.BACKBONE.NAME!r}: use {_OURS!r}"
        )
    path, key = (checkpoint, "OUTPUT_DIR") if checkpoint else (cfg.MODEL.WEIGHTS, WEIGHTS)
    if not path:
        if fpn.WARM_START_FROM:
            return
        raise ValueError(f"{KEY}: True, but {WEIGHTS} is '': name the checkpoint to start from")
    recorded = _recorded_model(path)
    if fpn.WARM_START_FROM and not recorded:
        return  # nothing is known but what the config says
    source = dict(recorded.get("FPN", {}).get("WARM_START_FROM") or {})
    if recorded.get("FPN", {}).get("WARM_START"):
        if not checkpoint:
            _check_same_target(cfg, recorded, path)
    elif checkpoint or evaluates:
        raise ValueError(
            f"{KEY}: True, but {path} ({key}) is of a run without it, and would be loaded as it"
            " is: leave it out"
        )
    else:
        source = describe_checkpoint(path)
    fpn.WARM_START_FROM = CfgNode(source, new_allowed=True)
    if checkpoint:
        logger.info("--resume: %s goes on as it is; %s adapts nothing", checkpoint, KEY)


def describe_checkpoint(path: str) -> dict[str, Any]:
    """The pyramid of a checkpoint, by the keys of `MODEL.FPN`.

    Raises:
        ValueError: naming MODEL.WEIGHTS, if it has none that is known.
    """
    recorded = _recorded_model(path)
    if recorded.get("BACKBONE", {}).get("NAME") == _OURS:
        return pyramid_settings(_settled(recorded))
    shapes = {name: tuple(x.shape) for name, x in read_state_dict(path, WEIGHTS).items()}
    return _detectron2_fpn(shapes, path, recorded.get("FPN", {}).get("FUSE_TYPE", "sum"))


def _recorded_model(path: str) -> Mapping[str, Any]:
    """`MODEL` of the run whose folder a checkpoint lies in; {} if there is none."""
    return {} if "://" in path else recorded_config(str(Path(path).parent)).get("MODEL", {})


def _settled(recorded: Mapping[str, Any]) -> CfgNode:
    """A config with a record's pyramid; what the record lacks is newer than it, and stands at its
    default."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = recorded.get("META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)
    for key in PYRAMID_KEYS:
        cfg.MODEL.FPN[key] = recorded.get("FPN", {}).get(key, cfg.MODEL.FPN[key])
    return cfg


def _check_same_target(cfg: CfgNode, recorded: Mapping[str, Any], path: str) -> None:
    """A warm-started checkpoint can be trained on and evaluated, but not started from anew."""
    then, now = pyramid_settings(_settled(recorded)), pyramid_settings(cfg)
    changed = [f"MODEL.FPN.{key} {then[key]!r} -> {now[key]!r}" for key in now]
    changed = [text for text, key in zip(changed, now) if then[key] != now[key]]
    if changed:
        raise ValueError(
            f"{KEY}: {WEIGHTS} {path!r} was itself started that way, and holds two pyramids; it"
            f" cannot become a third ({'; '.join(changed)}). Start from the first checkpoint"
        )


def _detectron2_fpn(
    shapes: Mapping[str, tuple[int, ...]], path: str, fuse: str
) -> dict[str, Any]:
    """The settings of Detectron2's own FPN, from its names and shapes."""
    names = [name for name in shapes if name.startswith("backbone.")]
    names = [name for name in names if not name.startswith("backbone.bottom_up.")]
    laterals = sorted({int(m[2]) for m in map(_FPN.fullmatch, names) if m})
    if not laterals:
        raise ValueError(
            f"{KEY}: {WEIGHTS} {path!r} is a checkpoint without a pyramid: no config.yaml of a run"
            " is beside it, and it has no names as backbone.fpn_lateral2.weight"
        )
    other = [name for name in names if not _FPN.fullmatch(name) and not _TOP.fullmatch(name)]
    if other:
        raise ValueError(
            f"{KEY}: {WEIGHTS} {path!r} has more than Detectron2's FPN ({other[0]}), and no"
            f" config.yaml of its run is beside it: put it there, or say in {FROM} what it is"
        )
    lateral = f"backbone.fpn_lateral{laterals[-1]}"
    width, channels = shapes[f"{lateral}.weight"][:2]
    return {
        **pyramid_settings(_settled({})),
        "IN_FEATURES": [f"res{level}" for level in laterals],
        "OUT_CHANNELS": width,
        "FUSE_TYPE": fuse,
        "NORM": _norm(lateral, shapes),
        "EXTRA_LEVELS": _extra(shapes, width, channels),
    }


def _norm(lateral: str, shapes: Mapping[str, Any]) -> str:
    if f"{lateral}.norm.weight" not in shapes:
        return ""
    return "BN" if f"{lateral}.norm.running_mean" in shapes else "GN"


def _extra(shapes: Mapping[str, tuple[int, ...]], width: int, channels: int) -> str:
    first = min((name for name in shapes if _TOP.fullmatch(name)), default="")
    if not first:
        return "maxpool"
    taken = shapes[first.rpartition(".")[0] + ".weight"][1]
    return "conv_c5" if taken == channels and channels != width else "conv_p5"


def check_state(state: Mapping[str, Tensor], path: str, names: list[str]) -> None:
    """Refuse a checkpoint that lacks some of these names.

    Raises:
        ValueError: naming MODEL.FPN.WARM_START_FROM.
    """
    lost = [name for name in names if name not in state]
    if lost:
        raise ValueError(
            f"{FROM} does not describe {WEIGHTS} {path!r}: it has no {', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}"
        )
