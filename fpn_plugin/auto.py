"""What a config leaves open, worked out before anything is built."""

from __future__ import annotations

from detectron2.config import CfgNode

from fpn_plugin.bottom_up.pixels import resolve_pixels
from fpn_plugin.engine.warm.source import resolve_warm_start
from fpn_plugin.heads.auto import resolve_heads


def resolve_config(cfg: CfgNode, checkpoint: str = "") -> CfgNode:
    """Replace what a config leaves to the plugin: `auto` in the heads' keys, pixel statistics,
    what a warm start starts from.

    Call it when the config is complete and not frozen, before the model and the data are built;
    the tools do. A config without such values stays as it is; a second call changes nothing.

    Args:
        checkpoint: of the whole model, if another than `MODEL.WEIGHTS` is loaded.

    Returns:
        the config that was given, changed in place.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and what is valid.
    """
    resolve_heads(cfg)
    resolve_warm_start(cfg, checkpoint)
    resolve_pixels(cfg, checkpoint)
    return cfg
