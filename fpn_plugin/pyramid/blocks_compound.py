"""Blocks of several convolutions. Shapes are `(N, C, H, W)`.

Inside them stands `inner_activation`, by default the block's `activation` or, where that is "", the
one of the paper: without any, the convolutions would come to a single linear one. As in a single
convolution, `activation` is what the block ends with, or begins with in the order "act-conv-norm".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, conv_block

_PRE = "act-conv-norm"


def _ends(activation: str, inner: str, order: str) -> tuple[str, str]:
    """The activations of a block's first and of its last convolution."""
    return (activation, inner) if order == _PRE else (inner, activation)


@BLOCKS.register("bottleneck")
class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 beside a shortcut (ResNet, arXiv:1512.03385; "act-conv-norm" after
    arXiv:1603.05027).

    The shortcut is a 1×1 convolution with norm where the channels change. `activation` follows the
    sum, or begins the branch in the order "act-conv-norm".

    Args:
        hidden_channels: between the convolutions. 0 for a quarter of `out_channels`.
        inner_activation: between the convolutions. None for `activation`, or else "relu".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        hidden_channels: int = 0,
        inner_activation: str | None = None,
    ) -> None:
        super().__init__()
        inner = (activation or "relu") if inner_activation is None else inner_activation
        hidden = hidden_channels or max(out_channels // 4, 1)
        first, _ = _ends(activation, inner, order)
        last = inner if order == _PRE else ""  # after the sum otherwise
        self.conv1 = conv_block(in_channels, hidden, 1, 1, norm, first, order)
        self.conv2 = conv_block(hidden, hidden, 3, 1, norm, inner, order)
        self.conv3 = conv_block(hidden, out_channels, 1, 1, norm, last, order)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else conv_block(in_channels, out_channels, 1, norm=norm)
        )
        self.activation = ACTIVATIONS.get("" if order == _PRE else activation, "activation")()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv3(self.conv2(self.conv1(x)))
        return self.activation(self.shortcut(x) + branch)


class _CSPUnit(nn.Module):
    """`x + 3×3(1×1(x))`."""

    def __init__(self, channels: int, norm: str, inner: str, order: str) -> None:
        super().__init__()
        self.conv1 = conv_block(channels, channels, 1, 1, norm, inner, order)
        self.conv2 = conv_block(channels, channels, 3, 1, norm, inner, order)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


@BLOCKS.register("csp")
class CSP(nn.Module):
    """Residual units on one half of the channels, the other half past them, and a 1×1 over both
    (CSPNet, arXiv:1911.11929; the layer as in YOLOX, arXiv:2107.08430).

    Args:
        depth: the number of residual units.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first two). None for `activation`, or else "silu".

    Raises:
        ValueError: if `out_channels` is odd or `depth` negative.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        depth: int = 1,
        inner_activation: str | None = None,
    ) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"csp halves its channels: {out_channels} is odd")
        if depth < 0:
            raise ValueError(f"depth: {depth} residual units; give 0 or more")
        inner = (activation or "silu") if inner_activation is None else inner_activation
        half = out_channels // 2
        first, last = _ends(activation, inner, order)
        self.main = conv_block(in_channels, half, 1, 1, norm, first, order)
        self.short = conv_block(in_channels, half, 1, 1, norm, first, order)
        self.units = nn.Sequential(*(_CSPUnit(half, norm, inner, order) for _ in range(depth)))
        self.final = conv_block(out_channels, out_channels, 1, 1, norm, last, order)

    def forward(self, x: Tensor) -> Tensor:
        return self.final(torch.cat([self.units(self.main(x)), self.short(x)], dim=1))


@BLOCKS.register("fsm")
class FeatureSelection(nn.Module):
    """`1×1(x + x · σ(1×1(GAP(x))))`: weighs the channels, then selects (FaPN, arXiv:2108.07058).

    The inner 1×1 has neither bias nor norm.

    Args:
        bias: of the outer 1×1. None for a bias exactly if there is no norm; the paper has none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.attention = conv_block(in_channels, in_channels, 1, bias=False)
        self.conv = conv_block(in_channels, out_channels, 1, 1, norm, activation, order, bias)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attention(x.mean(dim=(2, 3), keepdim=True)).sigmoid()  # (N, C, 1, 1)
        return self.conv(x + x * weights)
