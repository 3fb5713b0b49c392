"""`[auto]` in the heads' keys: the maps that they read, and their anchors, follow from the pyramid.

A level `l` is a stride of `2**l` pixels.
"""

from __future__ import annotations

import re
from typing import Any, Sequence

from detectron2.config import CfgNode

from fpn_plugin.bottom_up.pixels import require_pixels
from fpn_plugin.config import extra_levels_for, validate_config
from fpn_plugin.heads.inputs import ANCHORED, SIZES, cfg_get, head_features
from fpn_plugin.pyramid.compose import add_extra_levels, build_graph
from fpn_plugin.pyramid.graph import Graph
from fpn_plugin.pyramid.inline import parse_graph

AUTO = "auto"
# Heads that look at every place of every map, and heads that look at what a box or a pixel shows
_DENSE = ("MODEL.RPN.IN_FEATURES", "MODEL.RETINANET.IN_FEATURES", "MODEL.FCOS.IN_FEATURES")
_POOLED = ("MODEL.ROI_HEADS.IN_FEATURES", "MODEL.SEM_SEG_HEAD.IN_FEATURES")
AUTO_KEYS = (*_DENSE, *_POOLED, SIZES)
# Boxes from 448 pixels on are pooled from this level (arXiv:1612.03144, equation 1): no coarser one
# is of use
_TOP_POOLED = 5
_LEVEL = re.compile(r"(?:res|p)(\d+)")


def resolve_heads(cfg: CfgNode) -> None:
    """Replace `[auto]` in `AUTO_KEYS` by what follows from the pyramid, in place.

    RPN, RetinaNet and FCOS read all maps; the ROI heads and the semantic head those of level 5 and
    finer. RPN's anchors are 8 strides large, RetinaNet's 4 strides in three steps per octave. For
    the plain FPN these are the values of Detectron2's base configs.

    Raises:
        ValueError: if `auto` stands among other values, if there is no pyramid that it could follow
            from, or for a mistake in `MODEL.FPN`.
    """
    keys = [key for key in AUTO_KEYS if _is_auto(cfg, key)]
    if not keys:
        return
    if cfg.MODEL.BACKBONE.NAME != "build_pyramid_backbone":
        _refuse([key for key in keys if key in _read(cfg)], cfg.MODEL.BACKBONE.NAME)
        return  # what is left is not read
    levels = [int(name[1:]) for name in _graph(cfg, keys[0]).output_names()]
    pooled = [level for level in levels if level <= _TOP_POOLED] or levels
    for key in keys:
        if key != SIZES:
            _set(cfg, key, [f"p{level}" for level in (levels if key in _DENSE else pooled)])
    if SIZES in keys:  # after the maps that they are for
        _set(cfg, SIZES, _anchor_sizes(cfg, levels))


def require_resolved(cfg: CfgNode) -> None:
    """Refuse to build a model from a config that :func:`fpn_plugin.resolve_config` would change.

    Raises:
        ValueError: naming the key and what to call.
    """
    for key in _read(cfg):
        if AUTO in cfg_get(cfg, key):
            raise ValueError(
                f"{key}: {AUTO!r} is not worked out yet: call fpn_plugin.resolve_config(cfg) when"
                " the config is complete, before the model is built"
            )
    require_pixels(cfg)


def spell_auto(opts: Sequence[Any]) -> list[Any]:
    """`KEY VALUE` pairs with `auto` and `[auto]` as the list that these keys take.

    Detectron2 reads what a command line says as Python, where both are no lists of a word.
    """
    values = list(opts)
    for i in range(1, len(values), 2):
        word = "".join(values[i].split()) if isinstance(values[i], str) else ""
        if values[i - 1] in AUTO_KEYS and word in (AUTO, f"[{AUTO}]"):
            values[i] = [AUTO]
    return values


def _is_auto(cfg: CfgNode, key: str) -> bool:
    value = list(cfg_get(cfg, key))
    if AUTO in value and len(value) > 1:
        raise ValueError(f"{key}: {value} has {AUTO!r} among others: write [{AUTO}] alone, or none")
    return AUTO in value


def _read(cfg: CfgNode) -> list[str]:
    """The keys that the meta-architecture reads: all, if this plugin does not know it."""
    features = list(head_features(cfg))
    if not features:
        return list(AUTO_KEYS)
    return features + ([SIZES] if set(features) & set(ANCHORED) else [])


def _refuse(keys: Sequence[str], backbone: str) -> None:
    if keys:
        raise ValueError(
            f"{keys[0]}: [{AUTO}] follows from the pyramid of build_pyramid_backbone, and"
            f" MODEL.BACKBONE.NAME {backbone!r} has no such: set {', '.join(keys)} by hand"
        )


def _graph(cfg: CfgNode, key: str) -> Graph:
    """The pyramid of the config, with the levels that the bottom-up maps' names say."""
    validate_config(cfg)
    fpn = cfg.MODEL.FPN
    inputs: dict[str, int] = {}
    for name in fpn.IN_FEATURES:
        match = _LEVEL.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{key}: [{AUTO}] needs the levels of the bottom-up maps, which {name!r} of"
                " MODEL.FPN.IN_FEATURES does not tell (res<level> and p<level> do): set"
                f" {key} by hand"
            )
        inputs[name] = int(match[1])
    if not inputs:
        raise ValueError("MODEL.FPN.IN_FEATURES: it is empty; name the bottom-up maps to read")
    extra = extra_levels_for(cfg)
    if fpn.GRAPH:
        graph = add_extra_levels(parse_graph(inputs, fpn.GRAPH), extra)
    else:
        settings = {"repeats": fpn.REPEATS, "inner_levels": fpn.INNER_LEVELS}
        graph = build_graph(fpn.TOPOLOGY, inputs, extra_levels=extra, **settings)
    graph.check()
    return graph


def _anchor_sizes(cfg: CfgNode, levels: Sequence[int]) -> list[list[float]]:
    """One list of sizes in pixels for each map that the anchors are put on."""
    for key in ANCHORED:
        if key in head_features(cfg):
            levels = [_pyramid_level(key, name, levels) for name in cfg_get(cfg, key)]
    if cfg.MODEL.META_ARCHITECTURE != "RetinaNet":
        return [[8 * 2**level] for level in levels]
    return [
        [size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)]
        for size in (4 * 2**level for level in levels)
    ]


def _pyramid_level(key: str, name: str, levels: Sequence[int]) -> int:
    found = {f"p{level}": level for level in levels}
    if name not in found:
        raise ValueError(f"{key}: {name!r} is not among the pyramid's maps: {', '.join(found)}")
    return found[name]


def _set(cfg: CfgNode, key: str, value: list[Any]) -> None:
    section, _, name = key.rpartition(".")
    cfg_get(cfg, section)[name] = value
