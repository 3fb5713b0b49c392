"""Deformable convolution by torchvision's operator. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fpn_plugin.pyramid.blocks import (
    ACTIVATIONS,
    BLOCKS,
    ORDERS,
    at_least_float32,
    norm_layer,
)

TAPS = 9  # of a 3×3 kernel


class ModulatedConv(nn.Module):
    """A modulated deformable 3×3 convolution (DCNv2, arXiv:1811.11168).

    Every tap of the kernel is moved by an offset in pixels and scaled by a mask from 0 to 1, both
    by a 3×3 convolution that starts at zero: at first it is a plain convolution times one half.

    Args:
        guide_channels: of the map that offsets and masks come from.
        groups: parts of the input's channels, each with offsets and masks of its own.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        guide_channels: int,
        groups: int = 1,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups:
            raise ValueError(f"groups: {groups} groups do not divide {in_channels} channels")
        self.stride = stride
        self.split = [2 * TAPS * groups, TAPS * groups]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=1)  # as c2_xavier_fill
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.offset = Conv2d(guide_channels, sum(self.split), 3, stride=stride, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Convolve `x` with the kernel moved as `guide`, a map of the same size, says."""
        # (N, 3·9·groups, H, W): the (y, x) offsets of each group's taps, then their masks
        offset, mask = torch.split(at_least_float32(self.offset(guide)), self.split, dim=1)
        bias = self.bias
        moved = deform_conv2d(
            at_least_float32(x),
            offset,
            at_least_float32(self.weight),
            None if bias is None else at_least_float32(bias),
            stride=(self.stride, self.stride),
            padding=(1, 1),
            mask=mask.sigmoid(),
        )
        return moved.to(x.dtype)


@BLOCKS.register("deformable")
class DeformableBlock(nn.Module):
    """A modulated deformable 3×3 convolution (DCNv2, arXiv:1811.11168) with norm and activation.

    Args:
        groups: parts of the input's channels, each with offsets and masks of its own.
        order: one of `ORDERS`.
        bias: None for a bias exactly if there is no norm.

    Raises:
        ValueError: if `order`, `norm` or `activation` is unknown, or the groups do not divide the
            channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        bias: bool | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is unknown; choose from {', '.join(ORDERS)}")
        first = order == "act-conv-norm"
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        has_bias = norm == "" if bias is None else bias
        self.conv = ModulatedConv(in_channels, out_channels, in_channels, groups, stride, has_bias)
        self.norm = norm_layer(norm, out_channels) or nn.Identity()
        self.activation = ACTIVATIONS.get("" if first else activation, "activation")()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_activation(x)
        return self.activation(self.norm(self.conv(x, x)))
