"""Which pyramid a checkpoint has, by the keys of `MODEL.FPN`: `MODEL.FPN.WARM_START_FROM`."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from fpn_plugin.config import extra_levels_for
from fpn_plugin.registry import unknown_name

# The keys of MODEL.FPN that a pyramid follows from
PYRAMID_KEYS = (
    *("TOPOLOGY", "GRAPH", "REPEATS", "IN_FEATURES", "INNER_LEVELS", "EXTRA_LEVELS"),
    *("OUT_CHANNELS", "FUSE_TYPE", "UPSAMPLE", "DOWNSAMPLE", "LATERAL", "BLOCK"),
    *("NORM", "NORM_EPS", "NORM_MOMENTUM", "ACTIVATION"),
)
# MODEL.FPN.WARM_START_FROM of a checkpoint that has no pyramid
NO_PYRAMID = {"TOPOLOGY": "none"}


def pyramid_settings(cfg: CfgNode) -> dict[str, Any]:
    """The keys of `MODEL.FPN` that say what the pyramid is, as `MODEL.FPN.WARM_START_FROM` has
    them."""
    found = {key: cfg.MODEL.FPN[key] for key in PYRAMID_KEYS}
    return {**found, "EXTRA_LEVELS": extra_levels_for(cfg)}


def warm_settings(cfg: CfgNode) -> dict[str, Any]:
    """`MODEL.FPN.WARM_START_FROM` by the argument names of `PyramidBackbone`; {} without a warm
    start, or from a checkpoint without a pyramid.

    Raises:
        ValueError: (KeyError for an unknown key) naming it, where it does not say enough.
    """
    fpn = cfg.MODEL.FPN
    if not fpn.WARM_START or fpn.WARM_START_FROM == NO_PYRAMID:
        return {}
    where = "MODEL.FPN.WARM_START_FROM"
    if not fpn.WARM_START_FROM:
        raise ValueError(
            f"MODEL.FPN.WARM_START: True, but {where} is empty: call"
            " fpn_plugin.resolve_config(cfg) first; the tools do"
        )
    for key in fpn.WARM_START_FROM:
        if key not in PYRAMID_KEYS:
            raise unknown_name(where, key, PYRAMID_KEYS)
    for key in ("IN_FEATURES", "OUT_CHANNELS"):
        if key not in fpn.WARM_START_FROM:
            raise ValueError(f"{where}: it has no {key}, but {list(fpn.WARM_START_FROM)}")
    return {key.lower(): value for key, value in fpn.WARM_START_FROM.items()}
