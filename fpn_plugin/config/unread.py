"""Keys that are set, but that nothing will read: the model would not be what the config says."""

from __future__ import annotations

import functools
from typing import Any, Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from fpn_plugin.bottom_up.detectron2 import BUILDERS
from fpn_plugin.config.defaults import ARGS, OWN_BUILDERS, PYRAMID_BUILDER, add_fpn_config
from fpn_plugin.config.files import leaves
from fpn_plugin.registry import HOW_TO_ADD, unknown_name

BACKBONE = "MODEL.BACKBONE.NAME"
ARCHITECTURE = "MODEL.META_ARCHITECTURE"
_FPN, _BOTTOM_UP, _RESNETS, _FCOS = "MODEL.FPN", "MODEL.BOTTOM_UP", "MODEL.RESNETS", "MODEL.FCOS"
_WARM_FROM = f"{_FPN}.WARM_START_FROM"
# Detectron2's own keys, which base files set for all backbones, and the fusions that it knows
_THEIRS = frozenset(f"{_FPN}.{key}" for key in ("OUT_CHANNELS", "NORM", "FUSE_TYPE"))
_THEIR_FUSIONS = ("sum", "avg")
# Set for all heads and networks at once, in base files or by this plugin itself, whichever is built
_SHARED = (
    f"{_FPN}.IN_FEATURES",
    f"{_RESNETS}.OUT_FEATURES",
    f"{_BOTTOM_UP}.PIXELS",  # `config`, as an evaluation sets it, holds for any backbone
    f"{_FCOS}.NUM_CLASSES",
    f"{_FCOS}.IN_FEATURES",
)
# A graph's nodes say by themselves what these say of a topology
_NOT_OF_GRAPHS = tuple(f"{_FPN}.{key}" for key in ("TOPOLOGY", "LATERAL", "BLOCK", "INNER_LEVELS"))
_SHOWN = 6  # keys in an error


def refuse_unread_keys(cfg: CfgNode) -> None:
    """Refuse keys that differ from their defaults and that nothing reads with this config's
    backbone, network underneath and meta-architecture.

    Only of Detectron2's own builders and this plugin's is known what they read: of a builder, a
    network or a head that a user has registered nothing is refused.

    Raises:
        KeyError: for a `MODEL.BACKBONE.NAME` that nobody has registered.
        ValueError: naming the keys, their values, and the key to set so that they are read.
    """
    name, changed = cfg.MODEL.BACKBONE.NAME, changed_keys(cfg)
    if name not in BACKBONE_REGISTRY:
        known = [builder for builder, _ in BACKBONE_REGISTRY]
        raise unknown_name(BACKBONE, name, known, advice=HOW_TO_ADD)
    builder = BACKBONE_REGISTRY.get(name)
    if name != PYRAMID_BUILDER and (name in OWN_BUILDERS or is_detectron2s(builder)):
        _refuse_without_pyramid(name, changed)
    elif name == PYRAMID_BUILDER and cfg.MODEL.FPN.GRAPH:
        if keys := [key for key in changed if key in _NOT_OF_GRAPHS]:
            text = "MODEL.FPN.GRAPH is the whole pyramid"
            raise _unread(keys, changed, text, "set MODEL.FPN.GRAPH to []")
    if name == PYRAMID_BUILDER and _WARM_FROM in changed and not cfg.MODEL.FPN.WARM_START:
        text = f"{_FPN}.WARM_START is False"
        raise _unread([_WARM_FROM], changed, text, f"say {_FPN}.WARM_START: True")
    if name in OWN_BUILDERS:
        _refuse_of_resnet(cfg, changed)
    _refuse_of_fcos(cfg, changed)


def changed_keys(cfg: CfgNode) -> dict[str, Any]:
    """The keys with other values than their defaults, in the config's order; those that are shared
    by networks and heads of which only one is built are left out."""
    defaults = _defaults()
    changed = {
        key: value
        for key, value in leaves(cfg).items()
        if key in defaults and key not in _SHARED and not _is_same(value, defaults[key])
    }
    if cfg.MODEL.BOTTOM_UP.ARGS:
        changed[ARGS] = dict(cfg.MODEL.BOTTOM_UP.ARGS)
    if cfg.MODEL.FPN.WARM_START_FROM:  # its own keys are those of another pyramid
        changed[_WARM_FROM] = dict(cfg.MODEL.FPN.WARM_START_FROM)
    return changed


def is_detectron2s(registered: Any) -> bool:
    """Whether a registered object is Detectron2's own."""
    return registered.__module__.startswith("detectron2.")


@functools.lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    cfg = get_cfg()
    add_fpn_config(cfg)
    return leaves(cfg)


def _is_same(value: Any, default: Any) -> bool:
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(value) == list(default)
    return bool(value == default)


def _below(changed: dict[str, Any], section: str) -> list[str]:
    return [key for key in changed if key.startswith(f"{section}.")]


def _refuse_without_pyramid(name: str, changed: dict[str, Any]) -> None:
    """Detectron2's builders read no key of this plugin; that of a network alone, its keys only."""
    is_ours = name in OWN_BUILDERS
    keys = [key for key in _below(changed, _FPN) if key not in _THEIRS]
    fuse = f"{_FPN}.FUSE_TYPE"
    if changed.get(fuse, "sum") not in _THEIR_FUSIONS:
        keys.append(fuse)
    network = [] if is_ours else _below(changed, _BOTTOM_UP)
    if keys or network:
        what = "is without a pyramid" if is_ours else "is Detectron2's own"
        advice = f"say {BACKBONE}: {PYRAMID_BUILDER}"
        if not keys:
            advice += " (without a pyramid build_bottom_up_backbone)"
        raise _unread([*keys, *network], changed, f"{BACKBONE}: {name} {what}", advice)


def _refuse_of_resnet(cfg: CfgNode, changed: dict[str, Any]) -> None:
    """`MODEL.RESNETS` is for Detectron2's ResNet, and for the heads that have its last stage."""
    network = cfg.MODEL.BOTTOM_UP.NAME
    ours = {builder.__name__: builder for builder in BUILDERS}.get(network)
    if network in BACKBONE_REGISTRY and BACKBONE_REGISTRY.get(network) is not ours:
        ours = None  # the user's, under the same name
    is_other = "/" in network or ours is not None
    keys = _below(changed, _RESNETS)
    if keys and is_other and not _may_heads_read_resnets(cfg):
        advice = f"leave them out (the network's own arguments are {ARGS})"
        raise _unread(keys, changed, f"{_BOTTOM_UP}.NAME: {network} is no such ResNet", advice)


def _may_heads_read_resnets(cfg: CfgNode) -> bool:
    architecture, heads = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME
    if _is_user_architecture(architecture):
        return True
    if architecture not in ("GeneralizedRCNN", "PanopticFPN"):
        return False
    known = heads in ROI_HEADS_REGISTRY and is_detectron2s(ROI_HEADS_REGISTRY.get(heads))
    return heads == "Res5ROIHeads" or not known


def _is_user_architecture(name: str) -> bool:
    if name not in META_ARCH_REGISTRY:
        return True  # an error where it is built
    module = META_ARCH_REGISTRY.get(name).__module__
    return not module.startswith(("detectron2.", "fpn_plugin."))


def _refuse_of_fcos(cfg: CfgNode, changed: dict[str, Any]) -> None:
    name, keys = cfg.MODEL.META_ARCHITECTURE, _below(changed, _FCOS)
    if keys and name != "FCOS" and not _is_user_architecture(name):
        text = f"{ARCHITECTURE}: {name} has no such head"
        raise _unread(keys, changed, text, f"say {ARCHITECTURE}: FCOS")


def _unread(keys: Sequence[str], changed: dict[str, Any], why: str, advice: str) -> ValueError:
    values = ", ".join(f"{key}: {changed[key]!r}" for key in keys[:_SHOWN])
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    is_one = len(keys) == 1
    return ValueError(
        f"{values}{more} {'is' if is_one else 'are'} set, but nothing reads"
        f" {'it' if is_one else 'them'}: {why}. {advice[0].upper()}{advice[1:]}"
        + ("" if advice.startswith("leave") else f", or leave {'it' if is_one else 'them'} out")
    )
