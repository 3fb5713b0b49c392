"""Test-time augmentation (`TEST.AUG`): Detectron2's, for the models that it has it for."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, PanopticFPN
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from torch import nn

KEY = "TEST.AUG.ENABLED"
SUFFIX = "_TTA"  # of the results, as in Detectron2's training script


def check_test_augmentation(cfg: CfgNode) -> None:
    """Check that Detectron2 can augment at test time, if the config asks for it.

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
                f"{KEY}: Detectron2 augments at test time with GeneralizedRCNN for boxes and masks,"
                f" {cause}; set {KEY} False"
            )
    if not cfg.TEST.AUG.MIN_SIZES:
        raise ValueError("TEST.AUG.MIN_SIZES () has no size to resize images to")


def augment_at_test_time(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A model that merges its detections in several sizes of an image, and in mirrored images.

    Raises:
        The errors of :func:`check_test_augmentation`.
    """
    check_test_augmentation(cfg)
    augmented = GeneralizedRCNNWithTTA(cfg, model)
    augmented.training = model.training  # which Detectron2 restores after the evaluation
    return augmented
