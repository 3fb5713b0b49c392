"""Blocks of several units one after another: YOLO's. Shapes are `(N, C, H, W)`.

A unit is written as its convolutions, "1x1 3x3": `1x1`, `3x3`, `5x5`, ... up to `9x9`; with `dw`
before it a depthwise one; `rep` for the block of that name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import List

import torch
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import BLOCKS, ORDERS, conv_block, ends
from fpn_plugin.pyramid.blocks_rep import Rep

_CONV = re.compile(r"(dw)?([13579])x\2")


class Unit(nn.Sequential):
    """`x + convs(x)`, a norm and an activation in each convolution.

    Args:
        convs: as the module's docstring says.
        hidden: the channels between the convolutions.
        shortcut: whether `x` is added.

    Raises:
        ValueError: naming `unit`, if `convs` is none, or a depthwise convolution would change the
            channels.
    """

    def __init__(
        self,
        channels: int,
        convs: str,
        norm: str,
        activation: str,
        order: str,
        shortcut: bool,
        hidden: int,
    ) -> None:
        parts = convs.split() if isinstance(convs, str) else []
        if not parts:
            raise ValueError(f"unit: {convs!r} names no convolution; write e.g. '1x1 3x3'")
        widths = [channels, *[hidden] * (len(parts) - 1), channels]
        layers = OrderedDict(
            (f"conv{i}", _conv(part, widths[i - 1], widths[i], norm, activation, order))
            for i, part in enumerate(parts, 1)
        )
        super().__init__(layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self:
            y = conv(y)
        return x + y if self.shortcut else y


def _conv(
    part: str, in_channels: int, out_channels: int, norm: str, activation: str, order: str
) -> nn.Module:
    """One convolution of a unit."""
    if part == "rep":
        return Rep(in_channels, out_channels, norm=norm, activation=activation, order=order)
    match = _CONV.fullmatch(part)
    if match is None:
        raise ValueError(
            f"unit: {part!r} is not a convolution; write 1x1, 3x3, 5x5, 7x7 or 9x9, the same with"
            " dw before it for a depthwise one, or rep, and spaces between them"
        )
    depthwise, kernel = match.groups()
    if depthwise and in_channels != out_channels:
        raise ValueError(
            f"unit: {part!r} is depthwise and cannot turn {in_channels} channels into"
            f" {out_channels}"
        )
    groups = in_channels if depthwise else 1
    return conv_block(
        *(in_channels, out_channels, int(kernel), 1, norm, activation, order), groups=groups
    )


def _half(block: str, out_channels: int) -> int:
    if out_channels % 2:
        raise ValueError(f"{block} halves its channels: {out_channels} is odd")
    return out_channels // 2


def _check_depth(depth: int, least: int) -> None:
    if type(depth) is not int or depth < least:
        raise ValueError(f"depth: {depth!r} units; give {least} or more")


@BLOCKS.register("csp")
class CSP(nn.Module):
    """Residual units on one half of the channels, the other half past them, and a 1×1 over both
    (CSPNet, arXiv:1911.11929; the layer as in YOLOX, arXiv:2107.08430).

    Args:
        depth: the number of units.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first two). None for `activation`, or else "silu".
        shortcut: whether a unit adds its input. YOLO's pyramids have none.
        unit: its convolutions: "1x1 3x3" in YOLOX, "3x3 dw5x5 1x1" in RTMDet (arXiv:2212.07784),
            "3x3 rep" in PP-YOLOE (arXiv:2203.16250).

    Raises:
        ValueError: if `out_channels` is odd, `depth` negative, or `unit` no convolutions.
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
        shortcut: bool = True,
        unit: str = "1x1 3x3",
    ) -> None:
        super().__init__()
        half = _half("csp", out_channels)
        _check_depth(depth, 0)
        inner = (activation or "silu") if inner_activation is None else inner_activation
        first, last = ends(activation, inner, order)
        self.main = conv_block(in_channels, half, 1, 1, norm, first, order)
        self.short = conv_block(in_channels, half, 1, 1, norm, first, order)
        units = [Unit(half, unit, norm, inner, order, shortcut, half) for _ in range(depth)]
        self.units = nn.Sequential(*units)
        self.final = conv_block(out_channels, out_channels, 1, 1, norm, last, order)

    def forward(self, x: Tensor) -> Tensor:
        return self.final(torch.cat([self.units(self.main(x)), self.short(x)], dim=1))


@BLOCKS.register("c2f")
class C2f(nn.Module):
    """`1×1(concat(a, b, u₁, …, uₙ))`: halves `[a, b]` of one 1×1, the units uᵢ one after another on
    b, and a 1×1 over all of them (YOLOv8).

    Args:
        depth: the number n of units.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first). None for `activation`, or else "silu".
        shortcut: whether a unit adds its input. YOLO's pyramids have none.
        unit: its convolutions.

    Raises:
        ValueError: if `out_channels` is odd, `depth` negative, or `unit` no convolutions.
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
        shortcut: bool = True,
        unit: str = "3x3 3x3",
    ) -> None:
        super().__init__()
        half = _half("c2f", out_channels)
        _check_depth(depth, 0)
        inner = (activation or "silu") if inner_activation is None else inner_activation
        first, last = ends(activation, inner, order)
        self.main = conv_block(in_channels, 2 * half, 1, 1, norm, first, order)
        units = [Unit(half, unit, norm, inner, order, shortcut, half) for _ in range(depth)]
        self.units = nn.ModuleList(units)
        self.final = conv_block((2 + depth) * half, out_channels, 1, 1, norm, last, order)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.main(x).chunk(2, dim=1)
        parts: List[Tensor] = [a, b]
        for unit in self.units:
            parts.append(unit(parts[-1]))
        return self.final(torch.cat(parts, dim=1))


@BLOCKS.register("csp_stage")
class CSPStage(nn.Module):
    """`1×1(concat(1×1(x), y₁, …, yₙ))`: units yᵢ one after another on another 1×1, each kept
    (DAMO-YOLO, arXiv:2211.15444).

    Args:
        depth: the number n of units.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first two). None for `activation`, or else "silu".
        shortcut: whether a unit adds its input.
        unit: its convolutions.
        ratio: of the channels between a unit's convolutions, to those that it takes and gives.

    Raises:
        ValueError: if `out_channels` is odd, `depth` below 1, `unit` no convolutions, or `ratio`
            leaves no channels.
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
        shortcut: bool = True,
        unit: str = "rep 3x3",
        ratio: float = 1.0,
    ) -> None:
        super().__init__()
        half = _half("csp_stage", out_channels)
        _check_depth(depth, 1)
        hidden = int(half * ratio)
        if hidden < 1:
            raise ValueError(f"ratio: {ratio} of {half} channels are none")
        inner = (activation or "silu") if inner_activation is None else inner_activation
        first, last = ends(activation, inner, order)
        self.short = conv_block(in_channels, half, 1, 1, norm, first, order)
        self.main = conv_block(in_channels, half, 1, 1, norm, first, order)
        units = [Unit(half, unit, norm, inner, order, shortcut, hidden) for _ in range(depth)]
        self.units = nn.ModuleList(units)
        self.final = conv_block((1 + depth) * half, out_channels, 1, 1, norm, last, order)

    def forward(self, x: Tensor) -> Tensor:
        parts: List[Tensor] = [self.short(x)]
        y = self.main(x)
        for unit in self.units:
            y = unit(y)
            parts.append(y)
        return self.final(torch.cat(parts, dim=1))


@BLOCKS.register("rep_stage")
class RepStage(nn.Sequential):
    """Blocks `rep` one after another (YOLOv6, arXiv:2301.05586).

    Args:
        depth: the number of blocks.
        inner_activation: between the blocks. None for `activation`, or else "relu".
        identity: whether a block has the identity branch of RepVGG, where its channels stay.

    Raises:
        ValueError: if `depth` is below 1.
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
        identity: bool = True,
    ) -> None:
        _check_depth(depth, 1)
        inner = (activation or "relu") if inner_activation is None else inner_activation
        rest = [inner] * (depth - 1)
        activations = [activation, *rest] if order == ORDERS[1] else [*rest, activation]
        super().__init__(
            *(
                Rep(
                    out_channels if i else in_channels, out_channels, 1, norm, each, order, identity
                )
                for i, each in enumerate(activations)
            )
        )
