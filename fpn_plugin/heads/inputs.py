"""Which maps the heads of a config read, and whether the backbone gives them."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from fpn_plugin.config import require_names

SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
# the keys whose maps have anchors
ANCHORED = ("MODEL.RPN.IN_FEATURES", "MODEL.RETINANET.IN_FEATURES")


def validate_heads(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> None:
    """Check that the heads of the config read maps that the backbone gives, with as many anchors as
    maps.

    Args:
        shapes: what the backbone gives, by name ("p2", ...).

    Raises:
        ValueError: naming the key, the value and the maps that exist.
    """
    _validate_cascade(cfg)
    for key, features in head_features(cfg).items():
        missing = [name for name in features if name not in shapes]
        if missing:
            raise ValueError(
                f"{key}: {missing} are not among the backbone's maps: {', '.join(shapes)}"
            )
        if len(features) == 0:
            raise ValueError(f"{key}: it is empty; choose from {', '.join(shapes)}")
        if key in ANCHORED:
            _validate_anchors(cfg, key, len(features))
        if key == "MODEL.ROI_HEADS.IN_FEATURES":
            _validate_pooled(key, features, [shapes[name].stride or 1 for name in features])


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
        require_names(key, names)
    return features


def _validate_anchors(cfg: CfgNode, where: str, count: int) -> None:
    """Anchor sizes and ratios are given once for all maps, or once for each."""
    for key in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[key]
        lists = [value for value in values if isinstance(value, (list, tuple))]
        if lists and len(lists) not in (1, count):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key}: {len(lists)} lists for the {count} maps of {where}"
                f" {list(cfg_get(cfg, where))}: give one list for all, or {count}"
            )


def _validate_cascade(cfg: CfgNode) -> None:
    """Each stage refines the boxes of the one before, which have no class yet."""
    if cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: False, but MODEL.ROI_HEADS.NAME:"
                " CascadeROIHeads needs True"
            )


def _validate_pooled(key: str, features: Sequence[str], strides: Sequence[int]) -> None:
    """Detectron2's pooler chooses a level by a box's size, so none may be left out between."""
    if any(coarser != 2 * finer for finer, coarser in zip(strides, strides[1:])):
        raise ValueError(
            f"{key}: {list(features)} have strides of {list(strides)} pixels, but the pooler needs"
            " each to be twice the one before"
        )


def cfg_get(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
