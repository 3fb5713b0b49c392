"""Checks of the keys of how a detector learns: the average of its weights, large-scale jitter,
copy-paste, and the schedule of the rate."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Mapping, NamedTuple

from detectron2.config import CfgNode

from fpn_plugin.registry import unknown_name

EMA, LSJ, COPY_PASTE = "MODEL.EMA", "INPUT.LSJ", "INPUT.COPY_PASTE"
SCHEDULER = "SOLVER.LR_SCHEDULER_NAME"
_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")  # Detectron2's


class EMASettings(NamedTuple):
    """The keys of `MODEL.EMA`, in lower case, with their defaults."""

    decay: float = 0.999
    decay_warm_up_factor: int = 10


def read_ema(cfg: CfgNode) -> EMASettings | None:
    """The settings of `MODEL.EMA`, or None if it is not enabled.

    Raises:
        ValueError: naming the key, for a value that it cannot have.
    """
    return ema_settings(
        {key.lower(): value for key, value in cfg.MODEL.EMA.items()}, EMA, str.upper
    )


def ema_settings(entries: Mapping[str, Any], key: str, spelt: Any = str) -> EMASettings | None:
    """:func:`read_ema` of entries: `enabled`, `decay` and `decay_warm_up_factor`.

    Args:
        key: of the section, for messages.
        spelt: how its entries are written there.
    """
    known = {"enabled": False, **EMASettings()._asdict()}
    for name in entries:
        if name not in known:
            raise unknown_name(key, spelt(name), [spelt(each) for each in known])
    values = {**known, **entries}
    decay, factor = values["decay"], values["decay_warm_up_factor"]
    if not _is_number(decay) or not 0 <= decay < 1:
        raise ValueError(
            f"{key}.{spelt('decay')}: {decay!r} is not the share of the old average, from 0 to"
            " below 1"
        )
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < -1:
        raise ValueError(
            f"{key}.{spelt('decay_warm_up_factor')}: {factor!r} is not a whole number from 0 on, or"
            " -1 for none"
        )
    return EMASettings(float(decay), factor) if values["enabled"] else None


def check_learning(cfg: CfgNode) -> None:
    """Check the keys of `MODEL.EMA`, `INPUT.LSJ` and `INPUT.COPY_PASTE`.

    Raises:
        ValueError: naming the key, its value and what is valid, or the keys that exclude each
            other.
    """
    if read_ema(cfg) and cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            f"TEST.PRECISE_BN.ENABLED: True measures the statistics of the weights as trained, but"
            f" with {EMA}.ENABLED: True their averages are evaluated: set one of them to False"
        )
    if cfg.INPUT.LSJ.ENABLED:
        _check_jitter(cfg)
    if cfg.INPUT.COPY_PASTE.ENABLED:
        _check_copy_paste(cfg)


def check_schedule(cfg: CfgNode) -> None:
    """Check the schedule of the rate, for a trainer with those of Detectron2.

    Raises:
        KeyError: for an unknown `SOLVER.LR_SCHEDULER_NAME`.
        ValueError: naming the key that does not fit it.
    """
    solver = cfg.SOLVER
    name, rate, end = solver.LR_SCHEDULER_NAME, solver.BASE_LR, solver.BASE_LR_END
    if name not in _SCHEDULERS:
        raise unknown_name(SCHEDULER, name, _SCHEDULERS)
    if name == "WarmupCosineLR" and not 0 <= end <= rate:
        raise ValueError(
            f"SOLVER.BASE_LR_END: {end} is not the last rate of a {SCHEDULER}: {name}, from 0 to"
            f" SOLVER.BASE_LR: {rate}"
        )
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]  # Detectron2 warns of others
    if name == "WarmupMultiStepLR" and (
        steps != sorted(set(steps)) or solver.MAX_ITER in steps or min(steps, default=1) < 1
    ):
        raise ValueError(
            f"SOLVER.STEPS: {tuple(solver.STEPS)} are not iterations at which the rate falls, in"
            f" growing order between 0 and SOLVER.MAX_ITER: {solver.MAX_ITER}"
        )


def _check_jitter(cfg: CfgNode) -> None:
    size, least, most = (cfg.INPUT.LSJ[key] for key in ("IMAGE_SIZE", "MIN_SCALE", "MAX_SCALE"))
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            f"INPUT.CROP.ENABLED: True and {LSJ}.ENABLED: True both crop: set one of them to False"
        )
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{LSJ}.IMAGE_SIZE: {size!r} is not a side in pixels, a whole number")
    if not _is_number(least) or least <= 0:
        raise ValueError(f"{LSJ}.MIN_SCALE: {least!r} is not a factor above 0")
    polygons = cfg.INPUT.MASK_FORMAT == "polygon" and not cfg.INPUT.COPY_PASTE.ENABLED
    if cfg.MODEL.MASK_ON and polygons and importlib.util.find_spec("shapely") is None:
        raise ValueError(
            f"{LSJ}.ENABLED: True cuts polygons by the package shapely, which is not installed: pip"
            " install shapely, or set INPUT.MASK_FORMAT to bitmask"
        )
    if not _is_number(most) or most < least:
        raise ValueError(
            f"{LSJ}.MAX_SCALE: {most!r} is not a factor from {LSJ}.MIN_SCALE {least} on"
        )


def _check_copy_paste(cfg: CfgNode) -> None:
    needs = (
        ("MODEL.MASK_ON", True, "objects are cut out along their masks"),
        ("MODEL.KEYPOINT_ON", False, "keypoints that are pasted over would stay"),
        ("MODEL.LOAD_PROPOSALS", False, "pasted objects have no proposals"),
    )
    for key, needed, reason in needs:
        if getattr(cfg.MODEL, key.partition(".")[2]) != needed:
            raise ValueError(
                f"{COPY_PASTE}.ENABLED: True needs {key}: {needed}, as {reason}; set {COPY_PASTE}"
                ".ENABLED to False"
            )
    keys = cfg.INPUT.COPY_PASTE
    for name in ("PROB", "MIN_VISIBLE"):
        if not _is_number(keys[name]) or not 0 <= keys[name] <= 1:
            raise ValueError(f"{COPY_PASTE}.{name}: {keys[name]!r} is not a share from 0 to 1")
    most = keys.MAX_OBJECTS
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"{COPY_PASTE}.MAX_OBJECTS: {most!r} is not a whole number from 1 on")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
