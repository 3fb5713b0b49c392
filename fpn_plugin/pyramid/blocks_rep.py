"""Blocks of parallel convolutions, which inference runs as one, and blocks made of them. Shapes are
`(N, C, H, W)`.

A block with a method `merge_branches` is asked for that form by `TEST.FOLD_NORMS`, once the norms
inside it are folded. Where one is left, it changes nothing.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, ORDERS, conv_block, ends
from fpn_plugin.pyramid.norms import norm_layer


@BLOCKS.register("rep")
class Rep(nn.Module):
    """`3×3(x) + 1×1(x)`, a norm in each (RepVGG, arXiv:2101.03697; without its identity branch, as
    in RT-DETR, arXiv:2304.08069). Inference runs it as one 3×3.

    Args:
        order: one of `ORDERS`; the activation follows the sum, or precedes both convolutions.
        identity: whether `norm(x)` is added too where channels and size stay, as in RepVGG.

    Raises:
        ValueError: if `order`, `norm` or `activation` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        identity: bool = False,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is unknown; choose from {', '.join(ORDERS)}")
        first = order == ORDERS[1]
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        self.conv3: Any = conv_block(in_channels, out_channels, 3, stride, norm)
        self.conv1: Any = conv_block(in_channels, out_channels, 1, stride, norm)
        stays = identity and in_channels == out_channels and stride == 1
        self.identity: Any = (norm_layer(norm, in_channels) or nn.Identity()) if stays else None
        self.activation = ACTIVATIONS.get("" if first else activation, "activation")()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_activation(x)
        y = self.conv3(x)
        if self.conv1 is not None:  # not merged
            y = y + self.conv1(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.activation(y)

    def merge_branches(self) -> None:
        """Run as one 3×3 from now on, with the same results, unless a norm is left."""
        if self.conv1 is not None and is_linear(self.conv3) and is_linear(self.conv1):
            add_to(self.conv3, self.conv1)
            self.conv1 = None
            if self.identity is not None:
                add_to(self.conv3, _as_conv(self.identity, self.conv3))
                self.identity = None


def is_linear(conv: Conv2d) -> bool:
    """Whether it is a convolution alone: norm and activation are none, or folded away."""
    return all(part is None or type(part) is nn.Identity for part in (conv.norm, conv.activation))


@torch.no_grad()
def _as_conv(norm: Any, like: Conv2d) -> Conv2d:
    """The 1×1 that does what a norm with fixed statistics, or `nn.Identity`, does."""
    conv = Conv2d(like.in_channels, like.in_channels, 1, bias=False).to(like.weight)
    nn.init.dirac_(conv.weight)
    if not isinstance(norm, nn.Identity):
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    return conv


@torch.no_grad()
def add_to(wide: Conv2d, narrow: Conv2d) -> None:
    """Let a convolution give the sum of what both give; the second has the same stride, and its
    kernel is centred in the first one's."""
    margin = (wide.kernel_size[0] - narrow.kernel_size[0]) // 2
    trains = wide.weight.requires_grad
    weight = wide.weight + F.pad(narrow.weight, [margin] * 4)
    biases = [conv.bias for conv in (wide, narrow) if conv.bias is not None]
    wide.weight = nn.Parameter(weight, trains)
    wide.bias = nn.Parameter(torch.stack(biases).sum(0), trains) if biases else None


def _units(channels: int, norm: str, inner: str, order: str, depth: int) -> nn.Sequential:
    """`rep`, `depth` times."""
    if type(depth) is not int or depth < 0:
        raise ValueError(f"depth: {depth!r} rep units; give 0 or more")
    return nn.Sequential(*(Rep(channels, channels, 1, norm, inner, order) for _ in range(depth)))


def _check_hidden(expansion: float, hidden: int, channels: int) -> None:
    if hidden < 1:
        raise ValueError(f"expansion: {expansion!r} leaves none of {channels} channels; give more")


@BLOCKS.register("csp_rep")
class CSPRep(nn.Module):
    """`1×1(rep(… rep(1×1(x))) + 1×1(x))`: units on one path, none on the other, and their sum
    (RT-DETR, arXiv:2304.08069).

    The last 1×1 is there only if the paths have other channels than the output.

    Args:
        depth: the number of `rep` units.
        expansion: the paths have `int(expansion · out_channels)` channels.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first two). None for `activation`, or else "silu".

    Raises:
        ValueError: if `depth` is negative or `expansion` too small.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
        depth: int = 3,
        expansion: float = 1.0,
        inner_activation: str | None = None,
    ) -> None:
        super().__init__()
        inner = (activation or "silu") if inner_activation is None else inner_activation
        hidden = int(expansion * out_channels)
        _check_hidden(expansion, hidden, out_channels)
        first, last = ends(activation, inner, order)
        self.main = conv_block(in_channels, hidden, 1, 1, norm, first, order)
        self.short = conv_block(in_channels, hidden, 1, 1, norm, first, order)
        self.units = _units(hidden, norm, inner, order, depth)
        self.final = (
            nn.Identity()
            if hidden == out_channels
            else conv_block(hidden, out_channels, 1, 1, norm, last, order)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.final(self.units(self.main(x)) + self.short(x))


class _SplitRep(nn.Module):
    """`3×3(a + rep(… rep(b)))` with a and b the halves of one 1×1: `csp2` in DEIMv2's code.

    Args:
        trailing: whether the 3×3 is there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str,
        inner: str,
        order: str,
        depth: int,
        trailing: bool,
    ) -> None:
        super().__init__()
        self.split = conv_block(in_channels, 2 * out_channels, 1, 1, norm, inner, order)
        self.units = _units(out_channels, norm, inner, order, depth)
        self.final = (
            conv_block(out_channels, out_channels, 3, 1, norm, inner, order)
            if trailing
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        short, main = self.split(x).chunk(2, dim=1)
        return self.final(short + self.units(main))


class _Elan(nn.Module):
    """`1×1(concat(p, q, u, v))` with p and q the halves of a 1×1, `u = first(q)`, `v = second(u)`.

    Args:
        hidden: channels of u and v.
        branch: builds `first` and `second` from their channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str,
        activations: tuple[str, str],
        order: str,
        hidden: int,
        branch: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        first, last = activations
        self.split = conv_block(in_channels, 2 * out_channels, 1, 1, norm, first, order)
        self.first = branch(out_channels, hidden)
        self.second = branch(hidden, hidden)
        stacked = 2 * (out_channels + hidden)
        self.final = conv_block(stacked, out_channels, 1, 1, norm, last, order)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.split(x).chunk(2, dim=1)
        u = self.first(q)
        return self.final(torch.cat([p, q, u, self.second(u)], dim=1))


@BLOCKS.register("csp_elan")
def csp_elan(
    in_channels: int,
    out_channels: int,
    norm: str = "",
    activation: str = "",
    order: str = "conv-norm-act",
    depth: int = 3,
    expansion: float = 1.0,
    inner_activation: str | None = None,
) -> nn.Module:
    """Two steps of `3×3(csp_rep(x))` in a row on half of the channels, and a 1×1 over all that was
    computed on the way (YOLOv9's GELAN, arXiv:2402.13616; as in D-FINE, arXiv:2410.13842).

    Args:
        depth: the number of `rep` units in each `csp_rep`.
        expansion: of what the steps give, `round(expansion · out_channels // 2)` channels; their
            `csp_rep` has as many inside.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first). None for `activation`, or else "silu".

    Raises:
        ValueError: if `depth` is negative or `expansion` too small.
    """
    inner = (activation or "silu") if inner_activation is None else inner_activation
    hidden = round(expansion * out_channels // 2)
    _check_hidden(expansion, hidden, out_channels)

    def branch(channels: int, width: int) -> nn.Module:
        return nn.Sequential(
            CSPRep(channels, width, norm, inner, order, depth),
            conv_block(width, width, 3, 1, norm, inner, order),
        )

    activations = ends(activation, inner, order)
    return _Elan(in_channels, out_channels, norm, activations, order, hidden, branch)


@BLOCKS.register("csp_elan5")
def csp_elan5(
    in_channels: int,
    out_channels: int,
    norm: str = "",
    activation: str = "",
    order: str = "conv-norm-act",
    depth: int = 3,
    expansion: float = 1.0,
    inner_activation: str | None = None,
    trailing: bool = True,
) -> nn.Module:
    """`csp_elan` with `3×3(a + rep(… rep(b)))` for each step, a and b the halves of one 1×1
    (DEIMv2, arXiv:2509.20787).

    Args:
        depth: the number of `rep` units in each step.
        expansion: of what the steps give, `round(expansion · out_channels // 2)` channels.
        inner_activation: of all convolutions but the last (in the order "act-conv-norm": but the
            first). None for `activation`, or else "silu".
        trailing: whether a step ends in its 3×3; DEIMv2 on DINOv3 has none.

    Raises:
        ValueError: if `depth` is negative or `expansion` too small.
    """
    inner = (activation or "silu") if inner_activation is None else inner_activation
    hidden = round(expansion * out_channels // 2)
    _check_hidden(expansion, hidden, out_channels)

    def branch(channels: int, width: int) -> nn.Module:
        return _SplitRep(channels, width, norm, inner, order, depth, trailing)

    activations = ends(activation, inner, order)
    return _Elan(in_channels, out_channels, norm, activations, order, hidden, branch)
