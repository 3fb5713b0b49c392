"""BLOCKS that weigh a map by itself. Shapes are `(N, C, H, W)`.

Each multiplies the map by weights from 0 to 1. A convolution comes first where one is asked for, or
where the channels change: `BLOCK: se(kernel=3)` is 3×3, then `se`. It gets the block's
norm and order; `activation` is what the block ends with, or begins with in the order
"act-conv-norm".

They average whole maps, rows or columns. Detectron2 pads the images of a batch to one size, and the
averages count the padding: what an image gives depends a little on the batch that it is in, as with
`fsm`.
"""

from __future__ import annotations

import math
from typing import Tuple

import torch
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import (
    ACTIVATIONS,
    BLOCKS,
    ORDERS,
    at_least_float32,
    check_order,
    conv_block,
    initialize,
)
from fpn_plugin.pyramid.fusion import check_positive
from fpn_plugin.pyramid.norms import GroupNorm, norm_layer


class Attention(nn.Module):
    """Base class: `activation(attend(conv(x)))`, or `attend(conv(activation(x)))` in the order
    "act-conv-norm".

    Args:
        norm: of the convolution.
        kernel: of the convolution before it, an odd number; 0 for none, or for 1 where the channels
            change.

    Raises:
        ValueError: if `order`, `norm` or `activation` is unknown, or `kernel` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str,
        activation: str,
        order: str,
        kernel: int,
    ) -> None:
        super().__init__()
        check_order(order)
        if type(kernel) is not int or kernel < 0 or (kernel and kernel % 2 == 0):
            raise ValueError(f"kernel {kernel!r} is not 0 or an odd number")
        kernel = kernel or int(in_channels != out_channels)
        first, last = (activation, "") if order == ORDERS[1] else ("", activation)
        self.conv = (
            conv_block(in_channels, out_channels, kernel, 1, norm, first, order)
            if kernel
            else ACTIVATIONS.get(first, "activation")()
        )
        self.activation = ACTIVATIONS.get(last, "activation")()

    def attend(self, x: Tensor) -> Tensor:
        """Weigh the map; each of the blocks below has its own."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.attend(self.conv(x)))


def _hidden(channels: int, reduction: int, least: int = 1) -> int:
    """`channels / reduction`, at least `least`."""
    check_positive("reduction", reduction)
    return max(channels // reduction, least)


def _inner_norm(norm: str, channels: int) -> nn.Module | None:
    """A norm inside an attention block. GN is one group there: of so few channels there are no 32,
    and one stays one at another width."""
    return GroupNorm(1, channels) if norm == "GN" else norm_layer(norm, channels)


@BLOCKS.register("se")
class SqueezeExcitation(Attention):
    """`x · σ(1×1(ReLU(1×1(GAP(x)))))`: a weight per channel (SENet, arXiv:1709.01507).

    Args:
        kernel: of a convolution before it, see :class:`Attention`.
        reduction: of the channels between the two 1×1, by this factor.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        kernel: int = 0,
        reduction: int = 16,
    ) -> None:
        super().__init__(in_channels, out_channels, norm, activation, order, kernel)
        hidden = _hidden(out_channels, reduction)
        self.reduce = conv_block(out_channels, hidden, 1, activation="relu")
        self.expand = conv_block(hidden, out_channels, 1)

    def attend(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * self.expand(self.reduce(pooled)).sigmoid()


@BLOCKS.register("eca")
class EfficientChannelAttention(Attention):
    """`x · σ(conv1d(GAP(x)))`: a weight per channel, from its neighbours among the channels
    (ECA-Net, arXiv:1910.03151).

    The convolution over the channels has one kernel, without bias, of `|log₂ C + 1| / 2` values,
    rounded down and then up to an odd number of at least 3.

    Args:
        kernel: of a convolution before it, see :class:`Attention`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        kernel: int = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, norm, activation, order, kernel)
        neighbours = max(int((math.log2(out_channels) + 1) / 2) | 1, 3)
        self.weigh = nn.Conv1d(1, 1, neighbours, padding=neighbours // 2, bias=False)
        initialize(weight_init.c2_xavier_fill, self.weigh)

    def attend(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3)).unsqueeze(1)  # (N, 1, C)
        return x * self.weigh(pooled).sigmoid().squeeze(1)[:, :, None, None]


@BLOCKS.register("cbam")
class ConvolutionalAttention(SqueezeExcitation):
    """`y = x · σ(MLP(GAP(x)) + MLP(GMP(x)))`, then `y · σ(7×7(concat(max over C, mean over C)))`: a
    weight per channel, then one per pixel (CBAM, arXiv:1807.06521).

    MLP is `1×1(ReLU(1×1(·)))`, one for the average and the maximum of the map.

    Args:
        norm: also of the 7×7, which has one channel; GN makes it one group.
        kernel: of a convolution before it, see :class:`Attention`.
        reduction: of the channels inside the MLP, by this factor.

    Raises:
        ValueError: if the norm is LN, which would leave nothing of one channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        kernel: int = 0,
        reduction: int = 16,
    ) -> None:
        super().__init__(in_channels, out_channels, norm, activation, order, kernel, reduction)
        if norm == "LN":
            raise ValueError(
                "norm: LN normalises over channels, and cbam's 7x7 has only one; give cbam a norm"
                ' of its own: BN, SyncBN, FrozenBN, GN or ""'
            )
        layer = _inner_norm(norm, 1)
        self.spatial = Conv2d(2, 1, 7, padding=3, bias=layer is None, norm=layer)
        initialize(weight_init.c2_xavier_fill, self.spatial)

    def attend(self, x: Tensor) -> Tensor:
        average = self.expand(self.reduce(x.mean(dim=(2, 3), keepdim=True)))  # (N, C, 1, 1)
        largest = self.expand(self.reduce(x.amax(dim=(2, 3), keepdim=True)))
        x = x * (average + largest).sigmoid()
        planes = [x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)]
        return x * self.spatial(torch.cat(planes, dim=1)).sigmoid().type_as(x)  # (N, 1, H, W)


def _strips(x: Tensor) -> Tensor:
    """The averages of each row, then of each column: `(N, C, H + W, 1)`."""
    return torch.cat([x.mean(dim=3), x.mean(dim=2)], dim=2).unsqueeze(3)


def _rows_and_columns(strips: Tensor, height: int) -> Tuple[Tensor, Tensor]:
    """`(N, C, H, 1)` and `(N, C, 1, W)` of what has been computed from `_strips`."""
    return strips[:, :, :height], strips[:, :, height:].transpose(2, 3)


@BLOCKS.register("coord")
class CoordinateAttention(Attention):
    """`x · σ(1×1(y_rows)) · σ(1×1(y_columns))`: a weight per channel and row, times one per channel
    and column (coordinate attention, arXiv:2103.02907).

    `y = hardswish(1×1(concat(mean over W, mean over H)))` has at least 8 channels. All three 1×1
    have a bias.

    Args:
        norm: also of y; GN makes it one group.
        kernel: of a convolution before it, see :class:`Attention`.
        reduction: of the channels of y, by this factor.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        kernel: int = 0,
        reduction: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, norm, activation, order, kernel)
        hidden = _hidden(out_channels, reduction, 8)
        layer = _inner_norm(norm, hidden)
        self.reduce = Conv2d(out_channels, hidden, 1, norm=layer, activation=nn.Hardswish())
        initialize(weight_init.c2_xavier_fill, self.reduce)
        self.rows = conv_block(hidden, out_channels, 1)
        self.columns = conv_block(hidden, out_channels, 1)

    def attend(self, x: Tensor) -> Tensor:
        rows, columns = _rows_and_columns(self.reduce(_strips(x)), x.shape[2])
        return x * self.rows(rows).sigmoid() * self.columns(columns).sigmoid()


@BLOCKS.register("ema")
class MultiScaleAttention(Attention):
    """`x · σ(softmax(GAP(g₁)) g₂ + softmax(GAP(g₂)) g₁)` in each group of channels: a weight per
    group and pixel (EMA, arXiv:2305.13563).

    `g₂ = 3×3(x)`, and `g₁ = GN(x · σ(rows) · σ(columns))`, where rows and columns are
    `1×1(concat(mean over W, mean over H))`. Softmax and the products run over the channels of a
    group, GN normalises each channel on its own, and all groups share the convolutions.

    Args:
        norm: of the convolution before it alone.
        kernel: of a convolution before it, see :class:`Attention`.
        groups: of the channels.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        kernel: int = 0,
        groups: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, norm, activation, order, kernel)
        if type(groups) is not int or groups < 1 or out_channels % groups:
            raise ValueError(f"groups: {groups!r} groups do not divide {out_channels} channels")
        self.groups = groups
        channels = out_channels // groups
        self.conv1 = conv_block(channels, channels, 1)
        self.conv3 = conv_block(channels, channels, 3)
        self.norm = GroupNorm(channels, channels)

    def attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n * self.groups, c // self.groups, h, w)  # (NG, c, H, W)
        rows, columns = _rows_and_columns(self.conv1(_strips(x)), h)
        strips = self.norm(x * rows.sigmoid() * columns.sigmoid())
        square = self.conv3(x)
        weights = _weighted(strips, square) + _weighted(square, strips)  # (NG, 1, HW)
        weights = weights.sigmoid().reshape(n * self.groups, 1, h, w)
        return (x * weights.type_as(x)).reshape(n, c, h, w)


def _weighted(one: Tensor, other: Tensor) -> Tensor:
    """`softmax(GAP(one))` over the channels, times `other`: `(N, C, H, W)` -> `(N, 1, HW)`."""
    weights = at_least_float32(one.mean(dim=(2, 3))).softmax(dim=1)  # (N, C)
    return torch.bmm(weights.type_as(other).unsqueeze(1), other.flatten(2))
