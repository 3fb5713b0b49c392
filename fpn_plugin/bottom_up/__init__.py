"""The networks underneath a pyramid: Detectron2's registered backbones, and adapters for others."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from fpn_plugin.bottom_up.weights import load_weights
from fpn_plugin.registry import unknown_name

TIMM = "timm/"


def build_bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The network that `MODEL.BOTTOM_UP.NAME` names, with the weights of `MODEL.BOTTOM_UP.WEIGHTS`.

    Raises:
        KeyError: if there is no network of that name.
        ImportError: if the name is a timm model and timm is not installed.
        ValueError: if the weights do not fit.
    """
    key, name = "MODEL.BOTTOM_UP.NAME", cfg.MODEL.BOTTOM_UP.NAME
    if name.startswith(TIMM):
        from fpn_plugin.bottom_up.timm import TimmBackbone

        timm_backbone = TimmBackbone(
            name[len(TIMM) :],
            out_features=cfg.MODEL.FPN.IN_FEATURES,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
            norm=cfg.MODEL.BOTTOM_UP.NORM,
            in_channels=input_shape.channels,
        )
        bottom_up: Backbone = timm_backbone
        network: nn.Module = timm_backbone.model  # its weight files name tensors as timm does
    elif name in BACKBONE_REGISTRY:
        if cfg.MODEL.BOTTOM_UP.NORM:
            raise ValueError(
                f"MODEL.BOTTOM_UP.NORM: {cfg.MODEL.BOTTOM_UP.NORM!r} is for timm networks;"
                f" {name} takes its norm"
                " from its own keys (MODEL.RESNETS.NORM)"
            )
        bottom_up = network = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    else:
        known = [builder for builder, _ in BACKBONE_REGISTRY if builder != "build_pyramid_backbone"]
        raise unknown_name(key, name, [*known, "timm/<model>"])
    if cfg.MODEL.BOTTOM_UP.WEIGHTS:
        load_weights(network, cfg.MODEL.BOTTOM_UP.WEIGHTS)
    return bottom_up
