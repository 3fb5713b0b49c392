"""The maps that a config's heads read: `[auto]`, and whether the backbone gives them.

A level `l` is a stride of `2**l` pixels.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, Iterable, Mapping, Sequence

from detectron2.config import CfgNode, get_cfg

from fpn_plugin.config.defaults import PYRAMID_BUILDER, add_fpn_config
from fpn_plugin.config.settings import is_names, read_settings
from fpn_plugin.config.validate import keys_in_errors
from fpn_plugin.registry import bad_argument

logger = logging.getLogger(__name__)

AUTO = "auto"
SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
# Heads that look at every place of every map, and heads that look at what a box or a pixel shows
_RPN, _RETINANET = "MODEL.RPN.IN_FEATURES", "MODEL.RETINANET.IN_FEATURES"
_ROI_HEADS = "MODEL.ROI_HEADS.IN_FEATURES"
_DENSE = (_RPN, _RETINANET, "MODEL.FCOS.IN_FEATURES")
_POOLED = (_ROI_HEADS, "MODEL.SEM_SEG_HEAD.IN_FEATURES")
AUTO_KEYS = (*_DENSE, *_POOLED, SIZES)
# The keys whose maps have anchors
_ANCHORED = (_RPN, _RETINANET)
# the levels of Detectron2's base configs, whose anchors these are
_BASE_LEVELS = {_RPN: range(2, 7), _RETINANET: range(3, 8)}
# Boxes from 448 pixels on are pooled from this level (arXiv:1612.03144, equation 1): no coarser one
# is of use
_TOP_POOLED = 5
_LEVEL = re.compile(r"(?:res|p)(\d+)(?:_\d+)?")  # res4_3: one of several maps of a level
# Networks whose maps are named by their levels: those of the adapters, and of Detectron2
_MAPS = {"res2", "res3", "res4", "res5"}
_NAMED_BY_LEVEL = re.compile(r"(timm|torchvision)/.*|build_(resnet|regnet|swin|mvit|vit)_backbone")
_CHECKED = "_fpn_plugin_checks_heads"


def resolve_heads(cfg: CfgNode) -> None:
    """Replace `[auto]` in `AUTO_KEYS` by what follows from the pyramid, in place, and check the
    heads against it.

    What the config's heads do not read becomes Detectron2's default, so that one file can say
    `[auto]` for all heads. RPN, RetinaNet and FCOS read all maps; the ROI heads and the semantic
    head those of level 5 and finer. RPN's anchors are 8 strides large, RetinaNet's 4 strides in
    three steps per octave. For the plain FPN these are the values of Detectron2's base configs.

    Raises:
        ValueError: if `auto` stands among other values, if there is no pyramid that it could follow
            from, for a mistake in `MODEL.FPN`, or if a head reads what the pyramid does not give.
    """
    for key in (*AUTO_KEYS, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"):
        if not isinstance(cfg_get(cfg, key), (list, tuple)):
            example = "['p2', 'p3']" if key.endswith("IN_FEATURES") else "[[32], [64]]"
            raise ValueError(f"{key}: {cfg_get(cfg, key)!r} is not a list such as {example}")
    _refuse_auto_elsewhere(cfg.MODEL, "MODEL.")
    auto = [key for key in AUTO_KEYS if _is_auto(cfg, key)]
    if cfg.MODEL.BACKBONE.NAME != PYRAMID_BUILDER:
        _refuse_auto([key for key in auto if key in _keys_read(cfg)], cfg.MODEL.BACKBONE.NAME)
        return  # what is left is not read
    check_heads_when_built(cfg)
    if not auto and not _is_named_by_level(cfg):
        return
    with keys_in_errors():
        graph = read_settings(cfg).build_graph(_input_levels(cfg, auto[0] if auto else ""))
    levels = [int(name[1:]) for name in graph.output_names()]
    pooled = [level for level in levels if level <= _TOP_POOLED] or levels
    read = {*_keys_read(cfg), SIZES}
    read |= {_ROI_HEADS} if _RPN in read else set()  # the two halves of one detector
    for key in auto:
        if key not in read:
            _set(cfg, key, list(cfg_get(_defaults(), key)))
        elif key != SIZES:
            _set(cfg, key, [f"p{level}" for level in (levels if key in _DENSE else pooled)])
    if SIZES in auto or _are_sizes_outgrown(cfg, auto):  # after the maps that they are for
        _set(cfg, SIZES, _anchor_sizes(cfg, levels))
    if _is_named_by_level(cfg):
        validate_heads(cfg, {f"p{level}": 2**level for level in levels})


def check_heads_when_built(cfg: CfgNode) -> None:
    """Let the builder of the pyramid check the heads too: a whole model is built from this config.

    A note beside the config's keys, which its copies keep and its dump does not have. Without it
    the backbone may be built alone, whatever the heads' keys say.
    """
    vars(cfg)[_CHECKED] = True


def are_heads_checked(cfg: CfgNode) -> bool:
    """Whether :func:`check_heads_when_built` was called."""
    return vars(cfg).get(_CHECKED, False)


def require_resolved_heads(cfg: CfgNode) -> None:
    """Refuse to build a model from a config with `[auto]` in what its heads read.

    Raises:
        ValueError: naming the key and what to call.
    """
    for key in _keys_read(cfg):
        if AUTO in cfg_get(cfg, key):
            raise ValueError(
                f"{key}: {AUTO!r} is not resolved yet: call fpn_plugin.resolve_config(cfg) when the"
                " config is complete, before the model is built"
            )


def spell_auto(opts: Sequence[Any]) -> list[Any]:
    """`KEY VALUE` pairs with `auto` and `[auto]` as the list that these keys take.

    Detectron2 reads a command line's values as Python, where neither is a list of a text.
    """
    values = list(opts)
    for i in range(1, len(values), 2):
        word = "".join(values[i].split()) if isinstance(values[i], str) else ""
        if values[i - 1] in AUTO_KEYS and word in (AUTO, f"[{AUTO}]"):
            values[i] = [AUTO]
    return values


def head_features(cfg: CfgNode) -> dict[str, Sequence[str]]:
    """The maps that the heads of this meta-architecture read, by the key that names them.

    Raises:
        ValueError: if a key holds anything else than names.
    """
    model = cfg.MODEL
    architecture = model.META_ARCHITECTURE
    features: dict[str, Sequence[str]] = {}
    if architecture == "RetinaNet":
        features["MODEL.RETINANET.IN_FEATURES"] = model.RETINANET.IN_FEATURES
    if architecture == "FCOS":
        features["MODEL.FCOS.IN_FEATURES"] = model.FCOS.IN_FEATURES
    if architecture in ("GeneralizedRCNN", "ProposalNetwork", "PanopticFPN"):
        if model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
            features["MODEL.RPN.IN_FEATURES"] = model.RPN.IN_FEATURES
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        features["MODEL.ROI_HEADS.IN_FEATURES"] = model.ROI_HEADS.IN_FEATURES
    if architecture in ("PanopticFPN", "SemanticSegmentor"):
        features["MODEL.SEM_SEG_HEAD.IN_FEATURES"] = model.SEM_SEG_HEAD.IN_FEATURES
    for key, names in features.items():
        if not is_names(names):
            raise ValueError(f"{key}: {names!r} is not a list of names")
    return features


def validate_heads(cfg: CfgNode, strides: Mapping[str, int]) -> None:
    """Check that the heads read maps that the backbone gives, with as many anchors as maps.

    Args:
        strides: of the maps that the backbone gives, in pixels, by name ("p2", ...).

    Raises:
        ValueError: naming the key, the value and the maps that exist.
    """
    _validate_cascade(cfg)
    _validate_towers(cfg)
    for key, features in head_features(cfg).items():
        missing = [name for name in features if name not in strides]
        if missing:
            raise ValueError(
                f"{key}: {missing} are not among the backbone's maps: {', '.join(strides)}"
            )
        if len(features) == 0:
            raise ValueError(f"{key}: it is empty; choose from {', '.join(strides)}")
        if key in _ANCHORED:
            _validate_anchors(cfg, key, len(features))
        if key == "MODEL.ROI_HEADS.IN_FEATURES":
            if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and len(features) > 1:
                raise ValueError(
                    f"{key}: {list(features)}, but MODEL.ROI_HEADS.NAME: Res5ROIHeads (Detectron2's"
                    " default) reads one map: take StandardROIHeads"
                )
            _validate_pooled(key, features, [strides[name] for name in features])


def head_size_divisibility(cfg: CfgNode) -> int:
    """What the heads need the image's sides to be divisible by, in pixels; 0 for nothing.

    Detectron2's semantic head brings its maps to one size by doubling them.
    """
    if cfg.MODEL.META_ARCHITECTURE not in ("PanopticFPN", "SemanticSegmentor"):
        return 0
    levels = [name[1:] for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES if name[1:].isdigit()]
    return max((2 ** int(level) for level in levels), default=0)


def cfg_get(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@functools.lru_cache(maxsize=1)
def _defaults() -> CfgNode:
    """The values of all keys that nobody has set; not to be changed."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    return cfg


def _set(cfg: CfgNode, key: str, value: list[Any]) -> None:
    section, _, name = key.rpartition(".")
    cfg_get(cfg, section)[name] = value


def _is_auto(cfg: CfgNode, key: str) -> bool:
    value = list(cfg_get(cfg, key))
    if AUTO in value and len(value) > 1:
        raise ValueError(f"{key}: {value} has {AUTO!r} among others: write [{AUTO}] alone, or none")
    return AUTO in value


def _keys_read(cfg: CfgNode) -> list[str]:
    """The keys that the meta-architecture reads: all, if this plugin does not know it."""
    features = list(head_features(cfg))
    if not features:
        return list(AUTO_KEYS)
    return features + ([SIZES] if set(features) & set(_ANCHORED) else [])


def _refuse_auto_elsewhere(node: CfgNode, prefix: str) -> None:
    """Refuse `[auto]` in heads that this plugin does not know: which maps they need is not known.

    Raises:
        ValueError: naming the key and those that take it.
    """
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode):
            _refuse_auto_elsewhere(value, f"{key}.")
        elif name.endswith("IN_FEATURES") and key not in AUTO_KEYS:
            if value == AUTO or (isinstance(value, (list, tuple)) and AUTO in value):
                raise ValueError(
                    f"{key}: {value!r}: only {', '.join(AUTO_KEYS)} take [{AUTO}]: name the maps,"
                    " such as ['p2']"
                )


def _refuse_auto(keys: Sequence[str], backbone: str) -> None:
    if keys:
        raise ValueError(
            f"{keys[0]}: [{AUTO}] follows from the pyramid of {PYRAMID_BUILDER}, and"
            f" MODEL.BACKBONE.NAME {backbone!r} has no such: set {', '.join(keys)} by hand"
        )


def _is_named_by_level(cfg: CfgNode) -> bool:
    """Whether the names of the bottom-up maps say their levels for certain.

    Maps that the network does not give, or in another order, are left to the builder, which knows.
    """
    names = list(cfg.MODEL.FPN.IN_FEATURES)
    if not names or names != sorted(set(names)) or set(names) - _MAPS:
        return False
    is_dilated = cfg.MODEL.RESNETS.RES5_DILATION != 1  # then res5 has the stride of res4
    return bool(_NAMED_BY_LEVEL.fullmatch(cfg.MODEL.BOTTOM_UP.NAME)) and not is_dilated


def _input_levels(cfg: CfgNode, key: str) -> dict[str, int]:
    """The levels that the names of the bottom-up maps say.

    Args:
        key: that has `[auto]`, for the error.
    """
    inputs: dict[str, int] = {}
    for name in cfg.MODEL.FPN.IN_FEATURES:
        match = _LEVEL.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{key}: [{AUTO}] needs the levels of the bottom-up maps, which {name!r} of"
                " MODEL.FPN.IN_FEATURES does not tell (res<level> and p<level> do): set"
                f" {key} by hand"
            )
        inputs[name] = int(match[1])
    if not inputs:
        raise bad_argument("in_features", "it is empty; name the bottom-up maps to read")
    return inputs


def _anchor_sizes(cfg: CfgNode, levels: Sequence[int]) -> list[list[float]]:
    """One list of sizes in pixels for each map that the anchors are put on."""
    for key in _ANCHORED:
        if key in head_features(cfg):
            levels = [_pyramid_level(key, name, levels) for name in cfg_get(cfg, key)]
    return _sizes_of_levels(cfg.MODEL.META_ARCHITECTURE == "RetinaNet", levels)


def _sizes_of_levels(retinanet: bool, levels: Iterable[int]) -> list[list[float]]:
    if not retinanet:
        return [[8 * 2**level] for level in levels]
    return [
        [size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)]
        for size in (4 * 2**level for level in levels)
    ]


def _are_sizes_outgrown(cfg: CfgNode, auto: Sequence[str]) -> bool:
    """Whether the anchors are those of Detectron2's base config, and the pyramid has more levels
    or fewer than that: `[auto]` replaced its maps, and now the anchors have to follow. Anchors of a
    user's own stay, or are an error.

    Args:
        auto: the keys that had `[auto]`.
    """
    sizes = cfg_get(cfg, SIZES)
    for key in _ANCHORED:
        base = _sizes_of_levels(key == _RETINANET, _BASE_LEVELS[key])
        if key in auto and key in head_features(cfg) and list(map(_as_list, sizes)) == base:
            if len(cfg_get(cfg, key)) != len(base):
                logger.info("%s: Detectron2's %d follow the maps of %s", SIZES, len(base), key)
                return True
    return False


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _pyramid_level(key: str, name: str, levels: Sequence[int]) -> int:
    by_name = {f"p{level}": level for level in levels}
    if name not in by_name:
        raise ValueError(f"{key}: {name!r} is not among the pyramid's maps: {', '.join(by_name)}")
    return by_name[name]


def _validate_anchors(cfg: CfgNode, where: str, count: int) -> None:
    """Anchor sizes and ratios are given once for all maps, or once for each."""
    for key in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[key]
        _validate_anchor_values(f"MODEL.ANCHOR_GENERATOR.{key}", values)
        lists = [value for value in values if isinstance(value, (list, tuple))]
        if lists and len(lists) not in (1, count):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key}: {len(lists)} lists for the {count} maps of {where}"
                f" {list(cfg_get(cfg, where))}: give one list for all, {count}, or [{AUTO}]"
            )


def _validate_anchor_values(key: str, values: Any) -> None:
    """Positive numbers, or lists of them."""
    groups: Any = [values] if isinstance(values, (list, tuple)) else []
    if groups and any(isinstance(value, (list, tuple)) for value in values):
        groups = values
    for group in groups:
        if not isinstance(group, (list, tuple)) or not all(map(_is_positive, group)):
            groups = []
    if not groups or not all(groups):
        raise ValueError(
            f"{key}: {values!r} is no list of numbers above 0 for all maps, or of one for each map,"
            " such as [[32], [64]]"
        )


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and value > 0  # type: ignore[operator]


def _validate_cascade(cfg: CfgNode) -> None:
    """Each stage refines the boxes of the one before, which have no class yet."""
    if cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: False, but MODEL.ROI_HEADS.NAME:"
                " CascadeROIHeads needs True"
            )


def _validate_towers(cfg: CfgNode) -> None:
    """The predictors of Detectron2's dense heads are as wide as the convolution before them."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name in ("RetinaNet", "FCOS"):
        count = cfg.MODEL[name.upper()].NUM_CONVS
        if type(count) is not int or count < 1:
            raise ValueError(
                f"MODEL.{name.upper()}.NUM_CONVS: {count!r}, but Detectron2's head has at least"
                " one convolution in each of its two branches: set it to 1 or more"
            )


def _validate_pooled(key: str, features: Sequence[str], strides: Sequence[int]) -> None:
    """Detectron2's pooler chooses a level by a box's size, so none may be left out between."""
    if any(coarser != 2 * finer for finer, coarser in zip(strides, strides[1:])):
        raise ValueError(
            f"{key}: {list(features)} have strides of {list(strides)} pixels, but the pooler needs"
            " each to be twice the one before"
        )
