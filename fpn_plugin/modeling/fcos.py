"""Detectron2's FCOS for YAML configs."""

from __future__ import annotations

from typing import Any, List

from detectron2.config import CfgNode, configurable
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from torch import Tensor

from fpn_plugin.config.validate import plugin_config
from fpn_plugin.pyramid.norms import accept_single_values


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (arXiv:1904.01355) behind `MODEL.META_ARCHITECTURE: FCOS`.

    Model, losses and parameter names are Detectron2's, and so are checkpoints. Unlike it, this one
    also trains under autocast.

    Args:
        settings: of Detectron2's class.
    """

    @configurable
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments, from `MODEL.FCOS`.

        Raises:
            ValueError: if `MODEL.FCOS.NORM` is unknown or does not divide the channels.
        """
        settings = plugin_config(cfg).MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if missing := [name for name in settings.IN_FEATURES if name not in shapes]:
            raise ValueError(
                f"MODEL.FCOS.IN_FEATURES: {missing} are not among the backbone's maps:"
                f" {', '.join(shapes)}"
            )
        inputs = [shapes[name] for name in settings.IN_FEATURES]
        _check_norm(settings.NORM, inputs[0].channels)
        head = fcos.FCOSHead(
            input_shape=inputs,
            num_classes=settings.NUM_CLASSES,
            conv_dims=[inputs[0].channels] * settings.NUM_CONVS,
            norm=settings.NORM,
            prior_prob=settings.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": accept_single_values(head),
            "head_in_features": list(settings.IN_FEATURES),
            "num_classes": settings.NUM_CLASSES,
            "center_sampling_radius": settings.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": settings.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": settings.FOCAL_LOSS_GAMMA,
            "test_score_thresh": settings.SCORE_THRESH_TEST,
            "test_topk_candidates": settings.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": settings.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def _transpose_dense_predictions(
        self, predictions: List[List[Tensor]], dims_per_anchor: List[int]
    ) -> List[List[Tensor]]:
        """Detectron2's, in full precision: 8 bits place no box, and its loss refuses bfloat16."""
        full = [[x.float() for x in maps] for maps in predictions]
        return super()._transpose_dense_predictions(full, dims_per_anchor)


def _check_norm(norm: str, channels: int) -> None:
    try:
        get_norm(norm, channels)
    except (KeyError, ValueError) as error:  # unknown; or GroupNorm, 32 of which must fit
        raise ValueError(
            f"MODEL.FCOS.NORM: {norm!r} is no norm for maps of {channels} channels"
            f" (MODEL.FPN.OUT_CHANNELS): {error}; choose from BN, SyncBN, FrozenBN, LN,"
            " and for multiples of 32 GN"
        ) from None
