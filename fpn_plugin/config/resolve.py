"""From a file and a command line to a config, and what a config leaves open."""

from __future__ import annotations

import argparse
import logging

import torch
from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, OmegaConf

from fpn_plugin import plugins
from fpn_plugin.bottom_up.names import check_network_name
from fpn_plugin.checkpoint.checkpointer import find_checkpoint
from fpn_plugin.config.defaults import OWN_BUILDERS, PYRAMID_BUILDER, add_fpn_config
from fpn_plugin.config.files import (
    find_config_file,
    merge_config_file,
    merge_overrides,
    settle_own_paths,
)
from fpn_plugin.config.heads import resolve_heads
from fpn_plugin.config.learning import check_learning
from fpn_plugin.config.pixels import resolve_pixels
from fpn_plugin.config.unread import refuse_unread_keys
from fpn_plugin.config.validate import (
    check_pixels,
    plugin_config,
    require_compiled_operators,
    validate_config,
)
from fpn_plugin.config.warm_start import resolve_warm_start

logger = logging.getLogger(__name__)

_FELL_BACK = "_fpn_plugin_fell_back_to_cpu"
# Flags for one's own data, each for a key of DATASETS.OWN
DATA_FLAGS = ("train_json", "train_images", "val_json", "val_images")


def resolve_config(
    cfg: CfgNode | DictConfig, checkpoint: str = "", evaluates: bool = False
) -> CfgNode | DictConfig:
    """Check a config, and replace what it leaves to the plugin: `auto` in the heads' keys, pixel
    statistics, what a warm start starts from, and a GPU that is not there.

    Call it when the config is complete and not frozen, before the model and the data are built;
    the tools do. A config without such values stays as it is; a second call changes nothing.

    Args:
        checkpoint: of the whole model, if another than `MODEL.WEIGHTS` is loaded: that of a run
            that is resumed.
        evaluates: whether `MODEL.WEIGHTS` is loaded as it is, also with `MODEL.FPN.WARM_START`.

    Returns:
        the config that was given, changed in place.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and what is valid; also
            for keys that are set but that nothing reads (:func:`refuse_unread_keys`), and if
            `IMPORTS` names what is not imported (:func:`fpn_plugin.plugins.require`).
    """
    node = plugin_config(cfg)
    resolve_imports(node)
    refuse_unread_keys(node)
    check_learning(node)
    if node.MODEL.BACKBONE.NAME in OWN_BUILDERS:
        check_network_name(node.MODEL.BOTTOM_UP.NAME)
    if node.MODEL.BACKBONE.NAME == PYRAMID_BUILDER:
        validate_config(node)
    else:
        check_pixels(node)
    require_compiled_operators(node)
    resolve_heads(node)
    resolve_warm_start(node, checkpoint, evaluates)
    resolve_pixels(node, checkpoint)
    choose_device(node)
    if node is not cfg:
        cfg.merge_with(OmegaConf.create(node.dump()))
    return cfg


def load_config(args: argparse.Namespace) -> CfgNode:
    """The config of a file, `KEY VALUE` pairs and the data flags; resolved, not frozen.

    Args:
        args: of :func:`fpn_plugin.engine.setup.argument_parser`; where `config_file` is the name of
            a config, it becomes the path.

    Raises:
        FileNotFoundError: if the config file, or its `_BASE_`, does not exist.
        KeyError: for a key that does not exist.
        ValueError: for a file that is no plain YAML, a key without a value, a value of another type
            than the key's, or what :func:`resolve_config` raises.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    if args.config_file:
        args.config_file = find_config_file(args.config_file)
        merge_config_file(cfg, args.config_file)
    merge_overrides(cfg, list(args.opts or []))
    resolve_imports(cfg, args.config_file)
    for flag in DATA_FLAGS:
        if path := getattr(args, flag, ""):
            cfg.DATASETS.OWN[flag.upper()] = path
    settle_own_paths(cfg)
    # with both flags: an error, later
    is_resumed = getattr(args, "resume", False) and not args.overwrite
    checkpoint = find_checkpoint(cfg.OUTPUT_DIR) if is_resumed else ""
    return resolve_config(cfg, checkpoint, getattr(args, "eval_only", False))


def resolve_imports(cfg: CfgNode, file: str = "") -> None:
    """Set `IMPORTS` to what is imported for this config, in place.

    Args:
        file: that the config is from, for messages.

    Raises:
        ValueError: for what is not imported, and may not be: see
            :func:`fpn_plugin.plugins.require`.
    """
    names = plugins.require(cfg.IMPORTS, file or plugins.KEY)
    if names != list(cfg.IMPORTS):
        cfg.IMPORTS = names


def choose_device(cfg: CfgNode) -> None:
    """Set `MODEL.DEVICE` from its default, cuda, to cpu where there is no GPU, in place.

    The config remembers that nobody has asked for the CPU: see :func:`as_recorded`.
    """
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        vars(cfg)[_FELL_BACK] = True  # beside the keys: its copies have it, its dump does not
        logger.info("MODEL.DEVICE is 'cuda' but no GPU is available: using 'cpu'")


def as_recorded(cfg: CfgNode) -> CfgNode:
    """The config that a run writes down: without what holds for this machine alone.

    Returns:
        a copy, or the config that was given where it is the same.
    """
    if not vars(cfg).get(_FELL_BACK) or cfg.MODEL.DEVICE != "cpu":
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda"
    if frozen:
        cfg.freeze()
    return cfg
