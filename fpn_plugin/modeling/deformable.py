"""Detectron2's ResNet with deformable convolutions (`MODEL.RESNETS.DEFORM_ON_PER_STAGE`), computed
by torchvision's operator: Detectron2's own must be compiled, and its modulated one has no kernel
for the CPU. Shapes are `(N, C, H, W)`.
"""

from __future__ import annotations

from typing import Any, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import (
    CNNBlockBase,
    DeformBottleneckBlock,
    build_resnet_backbone,
)
from fvcore.nn import weight_init
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fpn_plugin.pyramid.blocks import at_least_float32

_TAPS = 9  # of a 3×3 kernel


class DeformConv(nn.Module):
    """A 3×3 deformable convolution (arXiv:1703.06211; with masks arXiv:1811.11168), then a norm.

    Its parameters have the names and shapes of Detectron2's `DeformConv` and `ModulatedDeformConv`.

    Args:
        groups: of the channels, each convolved by itself.
        norm: of the result; None for none.
    """

    def __init__(
        self,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stride = [stride, stride]
        self.dilation = [dilation, dilation]
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.norm = norm

    def forward(self, x: Tensor, offset: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Convolve.

        Args:
            offset: `(y, x)` of each tap in pixels, `(N, 18·deformable groups, H', W')`.
            mask: a factor of each tap, `(N, 9·deformable groups, H', W')`.
        """
        stride: List[int] = self.stride
        y = deform_conv2d(
            at_least_float32(x),
            at_least_float32(offset),
            at_least_float32(self.weight),
            None,
            stride=(stride[0], stride[1]),
            padding=(self.dilation[0], self.dilation[1]),
            dilation=(self.dilation[0], self.dilation[1]),
            mask=None if mask is None else at_least_float32(mask),
        )
        y = y.to(x.dtype)
        return y if self.norm is None else self.norm(y)


class DeformBottleneck(DeformBottleneckBlock):
    """Detectron2's block, without its operator; the arguments and parameter names are the same."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ) -> None:
        CNNBlockBase.__init__(self, in_channels, out_channels, stride)
        self.deform_modulated = deform_modulated
        width = bottleneck_channels
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = _conv1x1(in_channels, out_channels, stride, norm)
        self.conv1 = _conv1x1(in_channels, width, first, norm)
        self.conv2_offset = Conv2d(
            width,
            (3 if deform_modulated else 2) * _TAPS * deform_num_groups,
            3,
            stride=second,
            padding=dilation,
            dilation=dilation,
        )
        self.conv2 = DeformConv(width, second, dilation, num_groups, get_norm(norm, width))
        self.conv3 = _conv1x1(width, out_channels, 1, norm)
        for layer in (self.conv1, self.conv3, self.shortcut):
            if layer is not None:
                weight_init.c2_msra_fill(layer)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)


def _conv1x1(in_channels: int, out_channels: int, stride: int, norm: str) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        1,
        stride=stride,
        bias=False,
        norm=get_norm(norm, out_channels),
    )


def build_deformable_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet for a config with `DEFORM_ON_PER_STAGE`."""
    keys = cfg.MODEL.RESNETS
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    plain.MODEL.BACKBONE.FREEZE_AT = 0
    network: Any = build_resnet_backbone(plain, input_shape)
    for stage, is_deformable in zip(network.stages, keys.DEFORM_ON_PER_STAGE):
        for i in range(len(stage) if is_deformable else 0):
            block = stage[i]
            stage[i] = DeformBottleneck(
                block.in_channels,
                block.out_channels,
                bottleneck_channels=block.conv1.out_channels,
                stride=block.stride,
                num_groups=keys.NUM_GROUPS,
                norm=keys.NORM,
                stride_in_1x1=keys.STRIDE_IN_1X1,
                dilation=block.conv2.dilation[0],
                deform_modulated=keys.DEFORM_MODULATED,
                deform_num_groups=keys.DEFORM_NUM_GROUPS,
            )
    return network.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
