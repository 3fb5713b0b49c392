"""Test-time augmentation (`TEST.AUG`): Detectron2's, for the models that it has it for."""

from __future__ import annotations

from typing import Any, Mapping

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, PanopticFPN
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from torch import nn

from fpn_plugin.registry import unknown_name

KEY = "TEST.AUG.ENABLED"
SUFFIX = "_TTA"  # of the results, as in Detectron2's training script


def check_test_augmentation(cfg: CfgNode, key: str = KEY) -> None:
    """Check that Detectron2 can augment at test time, if the config asks for it.

    Args:
        key: that asks for it, for messages.

    Raises:
        ValueError: naming the key and the cause.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    name, model = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else GeneralizedRCNN
    rcnn = isinstance(kind, type) and issubclass(kind, GeneralizedRCNN)
    causes = {
        f"not with MODEL.META_ARCHITECTURE {name!r}": not rcnn or issubclass(kind, PanopticFPN),
        "not with MODEL.KEYPOINT_ON": model.KEYPOINT_ON,
        "not with MODEL.LOAD_PROPOSALS": model.LOAD_PROPOSALS,
    }
    for cause, found in causes.items():
        if found:
            raise ValueError(
                f"{key}: Detectron2 augments at test time with GeneralizedRCNN for boxes and masks,"
                f" {cause}; set {key} False"
            )
    if not cfg.TEST.AUG.MIN_SIZES:
        raise ValueError("TEST.AUG.MIN_SIZES () has no size to resize images to")


def python_settings(model: nn.Module, entries: Mapping[str, Any], key: str) -> CfgNode:
    """The keys of `TEST.AUG`, and those of the model that it reads, for a Python config.

    Args:
        entries: those keys in lower case, without `enabled`.
        key: of the section, for messages.

    Raises:
        KeyError: for an unknown entry.
        ValueError: as :func:`check_test_augmentation` raises it.
    """
    cfg = get_cfg()
    known = [name.lower() for name in cfg.TEST.AUG]
    for name, value in entries.items():
        if name not in known:
            raise unknown_name(key, name, known)
        cfg.TEST.AUG[name.upper()] = value
    heads = getattr(model, "roi_heads", None)
    cfg.MODEL.META_ARCHITECTURE = type(model).__name__
    cfg.MODEL.KEYPOINT_ON = getattr(heads, "keypoint_on", False)
    cfg.MODEL.LOAD_PROPOSALS = getattr(model, "proposal_generator", None) is None
    check_test_augmentation(cfg, f"{key}.enabled")
    predictor: Any = getattr(heads, "box_predictor", None)
    predictor = predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor  # a cascade's
    cfg.MODEL.MASK_ON = getattr(heads, "mask_on", False)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes  # type: ignore[union-attr]
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = predictor.test_nms_thresh
    cfg.TEST.DETECTIONS_PER_IMAGE = predictor.test_topk_per_image
    return cfg


def augment_at_test_time(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A model that merges its detections in several sizes of an image, and in mirrored images.

    Raises:
        The errors of :func:`check_test_augmentation`.
    """
    check_test_augmentation(cfg)
    augmented = GeneralizedRCNNWithTTA(cfg, model)
    augmented.training = model.training  # which Detectron2 restores after the evaluation
    return augmented
