"""Builders for those of Detectron2's networks that have no config keys: RegNet, Swin, MViT and ViT.

Each builds Detectron2's class with the arguments of a well-known size; `MODEL.BOTTOM_UP.ARGS`
changes them. Shapes are `(N, C, H, W)`.
"""

from __future__ import annotations

import inspect
from typing import Any, Dict, Mapping

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from fpn_plugin.bottom_up.base import (
    AdaptedBackbone,
    MapInfo,
    freeze,
    name_maps,
    number_maps,
    refuse_twins,
    select_maps,
)
from fpn_plugin.bottom_up.families import (
    ARGS,
    Family,
    MViTFamily,
    RegNetFamily,
    SwinFamily,
    ViTFamily,
)
from fpn_plugin.bottom_up.norms import freeze_norm_statistics
from fpn_plugin.registry import unknown_name

_INSTALL = {"timm": "pip install 'fpn_plugin[timm]'", "fairscale": "pip install fairscale"}


class Detectron2Backbone(AdaptedBackbone):
    """One of Detectron2's networks with its maps named `res<level>`, where level = log2(stride).

    Args:
        model: maps images to feature maps by its own names, from high to low resolution.
        maps: their properties by their new names, in the same order.
        pad_to: images are padded with zeros to multiples of this, in pixels.
    """

    def __init__(self, model: nn.Module, maps: Mapping[str, MapInfo], pad_to: int = 1) -> None:
        super().__init__(model, maps)
        self.pad_to = pad_to

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Run the network.

        Args:
            x: images, `(N, 3, H, W)`.

        Returns:
            `{"res2": (N, C2, H/4, W/4), ...}` from high to low resolution.
        """
        if self.pad_to > 1:
            x = F.pad(x, [0, -x.shape[3] % self.pad_to, 0, -x.shape[2] % self.pad_to])
        return super().forward(x)


def build_regnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Detectron2Backbone:
    """RegNet (arXiv:2003.13678); RegNetX-4GF by default.

    `stem_class` and `block_class` are names of `detectron2.modeling.backbone.regnet`.

    Raises:
        ValueError: (KeyError for an unknown argument or map) naming the config key.
    """
    return _build("build_regnet_backbone", RegNetFamily(), cfg, input_shape)


def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Detectron2Backbone:
    """Swin Transformer (arXiv:2103.14030); Swin-T by default.

    Raises:
        ImportError: if stochastic depth is on and timm is not installed.
        ValueError: (KeyError for an unknown argument or map) naming the config key.
    """
    return _build("build_swin_backbone", SwinFamily(), cfg, input_shape)


def build_mvit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Detectron2Backbone:
    """MViTv2 (arXiv:2112.01526); MViTv2-T by default.

    Raises:
        ImportError: if timm is not installed, or fairscale for `use_act_checkpoint`.
        ValueError: (KeyError for an unknown argument or map) naming the config key.
    """
    return _build("build_mvit_backbone", MViTFamily(), cfg, input_shape)


def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Detectron2Backbone:
    """ViT as in ViTDet (arXiv:2203.16527); ViT-B by default.

    With patches of 16 pixels its map is `res4`, for `MODEL.FPN.TOPOLOGY: simple`; `res4_3` is that
    after its third block, for `projector`.

    Raises:
        ImportError: if timm is not installed, or fairscale for `use_act_checkpoint`.
        ValueError: (KeyError for an unknown argument or map) naming the config key.
    """
    return _build("build_vit_backbone", ViTFamily(), cfg, input_shape)


BUILDERS = (
    build_regnet_backbone,
    build_swin_backbone,
    build_mvit_backbone,
    build_vit_backbone,
)


def register_builders() -> None:
    """Enter the builders of this module into `BACKBONE_REGISTRY`, if its names are free: a user may
    have registered builders of their own under them."""
    for build in BUILDERS:
        if build.__name__ not in BACKBONE_REGISTRY:
            BACKBONE_REGISTRY.register(build)


def _build(name: str, family: Family, cfg: CfgNode, input_shape: ShapeSpec) -> Detectron2Backbone:
    model = _construct(name, family, cfg.MODEL.BOTTOM_UP.ARGS, input_shape.channels or 3)
    strides = family.strides(model)
    stages = list(strides)
    deepest = name_maps(name, list(strides.values()))
    positions = {**number_maps(list(strides.values())), **deepest}
    wanted = cfg.MODEL.FPN.IN_FEATURES or list(deepest)
    maps, numbers = {}, []
    for map_name in select_maps(name, list(positions), wanted):
        number = positions[map_name]
        stage = stages[number]
        maps[map_name] = MapInfo(model._out_feature_channels[stage], strides[stage])
        numbers.append(number)
    refuse_twins(name, list(maps), numbers)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at >= 1:
        freeze(family.stem(model))
    for number, stride in enumerate(strides.values()):
        if stride <= 2**freeze_at:
            freeze(family.stage(model, number))
    family.shorten(model, [stages[number] for number in numbers], numbers[-1])
    freeze_norm_statistics(model)
    return Detectron2Backbone(model, maps, family.pad_to(model))


def _construct(name: str, family: Family, given: Mapping[str, Any], channels: int) -> Any:
    known = [
        argument
        for argument in inspect.signature(family.network_class.__init__).parameters
        if argument not in ("self", *family.reserved)
    ]
    for argument in given:
        if argument not in known:
            raise unknown_name(f"{ARGS} of {name}", argument, known)
    arguments = family.arguments(given, channels)
    try:
        return family.construct(arguments)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise ImportError(
            f"MODEL.BOTTOM_UP.NAME: {name} with {ARGS} {dict(given)} needs {package}:"
            f" {_INSTALL.get(package, f'pip install {package}')}"
        ) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = str(e) or type(e).__name__
        raise ValueError(f"{ARGS}: {dict(given)} does not build {name}: {reason}") from e
