"""Which pyramid a checkpoint has, for `MODEL.FPN.WARM_START`: from its run, or from its names."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from typing import Any, Mapping

from detectron2.config import CfgNode, get_cfg

from fpn_plugin import plugins
from fpn_plugin.checkpoint.files import read_state_dict
from fpn_plugin.checkpoint.run_folder import (
    CONFIG,
    config_of_checkpoint,
    is_python_record,
    recorded_config,
)
from fpn_plugin.config.defaults import PYRAMID_BUILDER, add_fpn_config
from fpn_plugin.config.files import drop_gone_keys
from fpn_plugin.config.settings import (
    PyramidSettings,
    pyramid_keys,
    read_settings,
    settings_from_keys,
    settings_of_python,
)
from fpn_plugin.registry import UnknownNameError, unknown_name

logger = logging.getLogger(__name__)

# MODEL.FPN.WARM_START_FROM of a checkpoint that has no pyramid
NO_PYRAMID = {"TOPOLOGY": "none"}

KEY, FROM, WEIGHTS = "MODEL.FPN.WARM_START", "MODEL.FPN.WARM_START_FROM", "MODEL.WEIGHTS"
_FPN = re.compile(r"backbone\.fpn_(lateral|output)(\d+)\.(weight|bias|norm\..+)")
_TOP = re.compile(r"backbone\.top_block\.p\d+\.(weight|bias)")


def resolve_warm_start(cfg: CfgNode, checkpoint: str = "", evaluates: bool = False) -> None:
    """Fill `MODEL.FPN.WARM_START_FROM`, in place, where `WARM_START` is on.

    Args:
        checkpoint: of the run that is resumed, if one is: it is loaded as it is.
        evaluates: whether `MODEL.WEIGHTS` is loaded as it is too.

    Raises:
        FileNotFoundError: if there is no such file as `MODEL.WEIGHTS`.
        ValueError: naming the key and its value, if the checkpoint's pyramid cannot be told, or
            does not go with this config.
    """
    fpn = cfg.MODEL.FPN
    path, key = (checkpoint, "OUTPUT_DIR") if checkpoint else (cfg.MODEL.WEIGHTS, WEIGHTS)
    if checkpoint or fpn.WARM_START:
        _refuse_gone_keys(path)
    recorded = _recorded_if_needed(cfg, path, key)
    record = recorded.get("FPN", {})
    if not fpn.WARM_START:
        if record.get("WARM_START"):
            text = f"{KEY}: False, but {path!r} ({key}) holds two pyramids: set it True"
            if checkpoint or evaluates:
                raise ValueError(text)
            logger.warning("%s to keep both", text)
        return
    if not path and not fpn.WARM_START_FROM:
        raise ValueError(f"{KEY}: True, but {WEIGHTS} is '': name the checkpoint to start from")
    # a warm-started checkpoint, which is loaded as it is
    if record.get("WARM_START") and record.get("WARM_START_FROM"):
        if not checkpoint:
            _check_same_target(cfg, recorded, path)
        fpn.WARM_START_FROM = _node(record["WARM_START_FROM"])
    elif (checkpoint or evaluates) and (recorded or not fpn.WARM_START_FROM):
        raise ValueError(
            f"{KEY}: True, but no config.yaml of a run with it is beside {path} ({key}), which"
            f" would be loaded as it is: leave it out, or say {FROM}"
        )
    elif recorded or not fpn.WARM_START_FROM:
        described = _node(describe_checkpoint(path))
        if fpn.WARM_START_FROM and fpn.WARM_START_FROM != described:
            logger.warning("%s gives way to the config.yaml beside %s (%s)", FROM, path, key)
        fpn.WARM_START_FROM = described
    if checkpoint:
        logger.info("--resume: %s goes on as it is; %s adapts nothing", checkpoint, KEY)


def warm_settings(cfg: CfgNode) -> PyramidSettings | None:
    """`MODEL.FPN.WARM_START_FROM` as a record; None without a warm start, or from a checkpoint
    without a pyramid.

    Raises:
        ValueError: (KeyError for an unknown key) naming it, where it does not say enough.
    """
    fpn = cfg.MODEL.FPN
    if not fpn.WARM_START or fpn.WARM_START_FROM == NO_PYRAMID:
        return None
    if not fpn.WARM_START_FROM:
        raise ValueError(
            f"{KEY}: True, but {FROM} is empty: call fpn_plugin.resolve_config(cfg) first; the"
            " tools do"
        )
    keys = pyramid_keys()
    for key in fpn.WARM_START_FROM:
        if key not in keys:
            raise unknown_name(FROM, key, keys)
    for key in ("IN_FEATURES", "OUT_CHANNELS"):
        if key not in fpn.WARM_START_FROM:
            raise ValueError(f"{FROM}: it has no {key}, but {list(fpn.WARM_START_FROM)}")
    return settings_from_keys(fpn.WARM_START_FROM)


def pyramid_settings(cfg: CfgNode) -> dict[str, Any]:
    """The pyramid of a config, as `MODEL.FPN.WARM_START_FROM` has it."""
    return read_settings(cfg).as_keys()


def _refuse_gone_keys(path: str) -> None:
    """Refuse a checkpoint whose run had set a key that is gone; an unreadable record says nothing.

    Raises:
        ValueError: naming the config.yaml, the key and its value.
    """
    if not path or "://" in path:
        return
    folder = Path(path).parent
    try:
        recorded = recorded_config(str(folder))
    except ValueError:
        return
    drop_gone_keys(recorded, str(folder / CONFIG))


def _recorded_if_needed(cfg: CfgNode, path: str, key: str) -> Mapping[str, Any]:
    """`recorded_model`; {} where the file beside the checkpoint is unreadable and not needed.

    LazyConfig writes a config.yaml too, most often with tags of Python.
    """
    try:
        return recorded_model(path)
    except ValueError as error:
        if cfg.MODEL.FPN.WARM_START and not cfg.MODEL.FPN.WARM_START_FROM:
            raise ValueError(
                f"{KEY}: True, but what pyramid {path!r} ({key}) has cannot be read beside it"
                f" ({error}): say it in {FROM}, by the keys of MODEL.FPN"
            ) from error
        return {}


def describe_checkpoint(path: str) -> dict[str, Any]:
    """The pyramid of a checkpoint, by the keys of `MODEL.FPN`; `NO_PYRAMID` if it has none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: (KeyError for an unknown name) naming MODEL.WEIGHTS, if it is none of a
            detector, or its pyramid is unknown.
    """
    recorded = recorded_model(path)
    if recorded.get("BACKBONE", {}).get("NAME") == PYRAMID_BUILDER:
        return _recorded_pyramid(recorded, path)
    shapes = {name: tuple(x.shape) for name, x in read_state_dict(path, WEIGHTS).items()}
    names = [name for name in shapes if name.startswith("backbone.")]
    if not names:
        raise ValueError(
            f"{KEY}: {WEIGHTS} {path!r} is no checkpoint of a detector: it has no names as"
            f" backbone.fpn_lateral2.weight, but {', '.join(list(shapes)[:3])}, ... The weights of"
            " a network alone go to MODEL.BOTTOM_UP.WEIGHTS"
        )
    above = [name for name in names if not name.startswith("backbone.bottom_up.")]
    if not above or above == names:  # Detectron2's C4 detectors have backbone.res4.…
        return dict(NO_PYRAMID)
    other = [name for name in above if not _FPN.fullmatch(name) and not _TOP.fullmatch(name)]
    if other:
        raise ValueError(
            f"{KEY}: {WEIGHTS} {path!r} has more than Detectron2's FPN ({other[0]}), and no"
            f" config.yaml of its run is beside it: put it there, or say in {FROM} what it is"
        )
    if not recorded:
        text = (
            "%s: no config of its run is beside %s: by its names it is taken for Detectron2's FPN"
        )
        logger.info(text, KEY, path)
    return _detectron2_fpn(shapes, above, path, recorded.get("FPN", {}).get("FUSE_TYPE", "sum"))


def _recorded_pyramid(recorded: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The pyramid of a run; the error for a name that is not known here says what that run had
    imported, if it says so."""
    try:
        settings = read_settings(_settled(recorded))
        settings.check()
    except UnknownNameError as error:
        names = config_of_checkpoint(path).get(plugins.KEY) or []
        had = f"; the run of {path} had {shlex.join(plugins.flags(map(str, names)))}"
        raise UnknownNameError(
            f"{FROM}: the checkpoint's pyramid: {error}{had if names else ''}"
        ) from error
    return settings.as_keys()


def recorded_model(path: str) -> Mapping[str, Any]:
    """`MODEL` of the run that wrote a checkpoint; {} if it is not known.

    Raises:
        ValueError: naming the config.yaml, if it is no plain YAML.
    """
    config = config_of_checkpoint(path)
    if is_python_record(config):
        settings = settings_of_python(config)
        return _as_model(settings) if settings else {}
    model = config.get("MODEL")
    if not isinstance(model, dict):
        return {}
    is_detectron2s = all(isinstance(model.get(section), dict) for section in ("FPN", "BACKBONE"))
    return model if is_detectron2s else {}


def _as_model(settings: PyramidSettings) -> dict[str, Any]:
    """The same as the `MODEL` of a YAML config says it."""
    return {"BACKBONE": {"NAME": PYRAMID_BUILDER}, "FPN": settings.as_keys()}


def _node(settings: Mapping[str, Any]) -> CfgNode:
    return CfgNode(dict(settings), new_allowed=True)


def _settled(recorded: Mapping[str, Any]) -> CfgNode:
    """A config with a record's pyramid; what the record lacks is newer than it, and stands at its
    default."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = recorded.get("META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)
    for key in pyramid_keys():
        cfg.MODEL.FPN[key] = recorded.get("FPN", {}).get(key, cfg.MODEL.FPN[key])
    return cfg


def _check_same_target(cfg: CfgNode, recorded: Mapping[str, Any], path: str) -> None:
    """A warm-started checkpoint can be trained on and evaluated, but not started from anew."""
    then, now = pyramid_settings(_settled(recorded)), pyramid_settings(cfg)
    changed = [key for key in now if then[key] != now[key]]
    if changed:
        texts = [f"MODEL.FPN.{key} {then[key]!r} -> {now[key]!r}" for key in changed]
        raise ValueError(
            f"{KEY}: {WEIGHTS} {path!r} was itself started that way, and holds two pyramids; it"
            f" cannot become a third ({'; '.join(texts)}). Start from the first checkpoint"
        )


def _detectron2_fpn(
    shapes: Mapping[str, tuple[int, ...]], names: list[str], path: str, fuse: str
) -> dict[str, Any]:
    """The settings of Detectron2's own FPN, from its names and shapes."""
    laterals = sorted({int(m[2]) for m in map(_FPN.fullmatch, names) if m})
    if not laterals:
        raise ValueError(f"{KEY}: {WEIGHTS} {path!r} has {names[0]}, but no backbone.fpn_lateral…")
    lateral = f"backbone.fpn_lateral{laterals[-1]}"
    width, channels = shapes[f"{lateral}.weight"][:2]
    tops = [name for name in names if _TOP.fullmatch(name) and name.endswith("weight")]
    extra = "maxpool"
    if tops:
        if width == channels:
            raise ValueError(
                f"{KEY}: {WEIGHTS} {path!r}: {tops[0]} may read the network's last map or the"
                f" pyramid's, as both have {width} channels; say in {FROM} what the pyramid is"
            )
        extra = "conv_c5" if shapes[min(tops)][1] == channels else "conv_p5"
    return {
        **pyramid_settings(_settled({})),
        "IN_FEATURES": [f"res{level}" for level in laterals],
        "OUT_CHANNELS": width,
        "FUSE_TYPE": fuse,
        "NORM": _norm(f"{lateral}.norm.", shapes),
        "EXTRA_LEVELS": extra,
    }


def _norm(prefix: str, shapes: Mapping[str, Any]) -> str:
    """`MODEL.FPN.NORM`; one without statistics is taken for GN, which Detectron2's zoo has."""
    if f"{prefix}weight" not in shapes:
        return ""
    if f"{prefix}running_mean" not in shapes:
        return "GN"
    return "BN" if f"{prefix}num_batches_tracked" in shapes else "FrozenBN"
