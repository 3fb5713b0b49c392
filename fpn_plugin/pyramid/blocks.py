"""BLOCKS: the convolutions of laterals, projections and nodes. Shapes are `(N, C, H, W)`.

A block is built as `Block(in_channels, out_channels, norm=..., activation=..., **arguments)`.
`activation` is what it ends with, or begins with in the order "act-conv-norm".

Between the convolutions of a block that has several stands `inner_activation`: by default the
block's `activation` or, where that is "", the paper's. Without any, the convolutions would amount
to a single linear one.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Callable, Iterator, Optional

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fpn_plugin.pyramid.norms import norm_layer
from fpn_plugin.registry import Registry

BLOCKS: Registry[Callable[..., nn.Module]] = Registry("block")
ACTIVATIONS: Registry[Callable[[], nn.Module]] = Registry("activation")
ORDERS = ("conv-norm-act", "act-conv-norm")
_PRE = ORDERS[1]
_TAPS = 9  # of a 3×3 kernel
# the calls of `initialize` that wait for the end of `initialize_together`
_WAITING: ContextVar[list[Callable[[], Any]] | None] = ContextVar("_WAITING", default=None)

for _name, _activation in {
    "": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,  # the name in EfficientDet's paper
}.items():
    ACTIVATIONS.register(_name)(_activation)


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32, for operators that lack it or lose accuracy in it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def initialize(function: Callable[[Any], Any], target: nn.Module | Tensor) -> None:
    """Call `function(target)`, which sets initial weights: now, or at the end of
    `initialize_together`."""
    waiting = _WAITING.get()
    if waiting is None:
        function(target)
    else:
        waiting.append(lambda: function(target))


@contextmanager
def initialize_together() -> Iterator[None]:
    """Initialise all blocks that are built inside at its end, in the order of their building.

    Detectron2's FPN makes both convolutions of a level before it fills them. As making one draws
    random numbers too, only the same order gives the same weights under the same seed.
    """
    token = _WAITING.set([])
    try:
        yield
        for call in _WAITING.get() or []:
            call()
    finally:
        _WAITING.reset(token)


def check_order(order: str) -> None:
    """Raise a ValueError if `order` is not one of `ORDERS`."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is unknown; choose from {', '.join(ORDERS)}")


class _PreActivationConv(Conv2d):
    """activation -> convolution -> norm, with the parameter names of Detectron2's `Conv2d`."""

    def __init__(self, *args: int, pre_activation: nn.Module, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.pre_activation = pre_activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_activation(x)
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        return x


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    norm: str = "",
    activation: str = "",
    order: str = "conv-norm-act",
    bias: bool | None = None,
    groups: int = 1,
) -> Conv2d:
    """A "same"-padded convolution with norm and activation; its size is `ceil(H / stride)`.

    It has Detectron2's initialisation (`c2_xavier_fill`) and parameter names: `weight`, `bias`,
    `norm.*`.

    Args:
        order: one of `ORDERS`.
        bias: None for a bias only if there is no norm.

    Raises:
        ValueError: if `order`, `norm` or `activation` is unknown.
    """
    act = ACTIVATIONS.get(activation, "activation")()
    keywords = {
        "stride": stride,
        "padding": kernel // 2,
        "groups": groups,
        "bias": norm == "" if bias is None else bias,
        "norm": norm_layer(norm, out_channels),
    }
    check_order(order)
    if order == "conv-norm-act":
        conv = Conv2d(
            in_channels, out_channels, kernel, activation=act if activation else None, **keywords
        )
    else:
        conv = _PreActivationConv(in_channels, out_channels, kernel, pre_activation=act, **keywords)
    initialize(weight_init.c2_xavier_fill, conv)
    return conv


@BLOCKS.register("conv1x1")
def conv1x1(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    norm: str = "",
    activation: str = "",
    order: str = "conv-norm-act",
    bias: bool | None = None,
) -> nn.Module:
    """A 1x1 convolution."""
    return conv_block(in_channels, out_channels, 1, stride, norm, activation, order, bias)


@BLOCKS.register("conv3x3")
def conv3x3(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    norm: str = "",
    activation: str = "",
    order: str = "conv-norm-act",
    bias: bool | None = None,
) -> nn.Module:
    """A 3x3 convolution."""
    return conv_block(in_channels, out_channels, 3, stride, norm, activation, order, bias)


@BLOCKS.register("separable")
class SeparableConv(nn.Module):
    """Depthwise 3x3, then pointwise 1x1 (Sifre 2014; as in EfficientDet, arXiv:1911.09070).

    The depthwise convolution has no bias; bias, norm and activation belong to the pointwise one,
    except that "act-conv-norm" activates before both.
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
    ) -> None:
        super().__init__()
        first = order == _PRE
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        self.depthwise = Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        initialize(weight_init.c2_xavier_fill, self.depthwise)
        rest = ("", "conv-norm-act") if first else (activation, order)
        self.pointwise = conv_block(in_channels, out_channels, 1, 1, norm, *rest, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(self.pre_activation(x)))


class ModulatedKernel(nn.Module):
    """The kernel of a modulated deformable 3×3 convolution (DCNv2, arXiv:1811.11168): every tap is
    moved by an offset in pixels and scaled by a mask, which it is given.

    Args:
        groups: of the input's channels, each with its own offsets and masks.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups:
            raise ValueError(f"groups: {groups} groups do not divide {in_channels} channels")
        self.stride = stride
        self.split = [2 * _TAPS * groups, _TAPS * groups]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=1)  # as c2_xavier_fill
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def convolve(self, x: Tensor, offset: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Convolve.

        Args:
            offset: `(y, x)` of each group's taps in pixels, `(N, 18·groups, H', W')`.
            mask: a factor of each tap, `(N, 9·groups, H', W')`; None for ones.
        """
        bias = self.bias
        y = deform_conv2d(
            at_least_float32(x),
            at_least_float32(offset),
            at_least_float32(self.weight),
            None if bias is None else at_least_float32(bias),
            stride=(self.stride, self.stride),
            padding=(1, 1),
            mask=None if mask is None else at_least_float32(mask),
        )
        return y.to(x.dtype)


class ModulatedConv(ModulatedKernel):
    """The kernel with offsets, and masks from 0 to 1, that it predicts itself, by a 3×3 convolution
    of zeros: so it starts as a plain convolution times one half.

    Args:
        guide_channels: of the map that offsets and masks are predicted from.
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
        super().__init__(in_channels, out_channels, groups, stride, bias)
        self.offset = Conv2d(guide_channels, sum(self.split), 3, stride=stride, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Convolve `x` with offsets and masks predicted from `guide`, a map of the same size."""
        # (N, 3·9·groups, H', W'): the (y, x) offsets of each group's taps, then their masks
        offset, mask = torch.split(at_least_float32(self.offset(guide)), self.split, dim=1)
        return self.convolve(x, offset, mask.sigmoid())


@BLOCKS.register("deformable")
class DeformableBlock(nn.Module):
    """A modulated deformable 3×3 convolution (DCNv2, arXiv:1811.11168) with norm and activation.

    Args:
        groups: of the input's channels, each with its own offsets and masks.
        order: one of `ORDERS`.
        bias: None for a bias only if there is no norm.

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
        check_order(order)
        first = order == _PRE
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        has_bias = norm == "" if bias is None else bias
        self.conv = ModulatedConv(in_channels, out_channels, in_channels, groups, stride, has_bias)
        self.norm = norm_layer(norm, out_channels) or nn.Identity()
        self.activation = ACTIVATIONS.get("" if first else activation, "activation")()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_activation(x)
        return self.activation(self.norm(self.conv(x, x)))


def ends(activation: str, inner: str, order: str) -> tuple[str, str]:
    """The activations of a block's first and last convolution."""
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
        first, _ = ends(activation, inner, order)
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


@BLOCKS.register("fsm")
class FeatureSelection(nn.Module):
    """`1×1(x + x · σ(1×1(GAP(x))))`: channel attention, then selection (FaPN, arXiv:2108.07058).

    The inner 1×1 has neither bias nor norm.

    Args:
        bias: of the outer 1×1. None for a bias only if there is no norm; the paper has none.
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


@BLOCKS.register("non_local")
class NonLocal(nn.Module):
    """`x + W(softmax(θ(x)ᵀ φ(x)) g(x))`: attention between all positions (non-local networks,
    arXiv:1711.07971).

    The embedded-Gaussian form. W starts at zero, so that the block starts as the identity. Its cost
    grows with the square of H·W, so it belongs on a coarse level.

    Args:
        reduction: of the channels inside, by this factor.

    Raises:
        ValueError: if the channels change.
    """

    def __init__(
        self, in_channels: int, out_channels: int, reduction: int = 1, norm: str = ""
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"non_local cannot turn {in_channels} channels into {out_channels}")
        inner = max(1, in_channels // reduction)
        self.theta = Conv2d(in_channels, inner, 1)
        self.phi = Conv2d(in_channels, inner, 1)
        self.g = Conv2d(in_channels, inner, 1)
        for conv in (self.theta, self.phi, self.g):
            initialize(weight_init.c2_xavier_fill, conv)
        self.out = conv_block(inner, in_channels, 1, norm=norm)
        scale = getattr(self.out.norm, "weight", None)  # None without a norm, or without affine
        initialize(nn.init.zeros_, self.out.weight if scale is None else scale)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x).flatten(2).transpose(1, 2)  # (N, HW, C')
        phi = self.phi(x).flatten(2)  # (N, C', HW)
        g = self.g(x).flatten(2).transpose(1, 2)  # (N, HW, C')
        attention = torch.softmax(torch.bmm(theta, phi), dim=-1)  # (N, HW, HW)
        y = torch.bmm(attention.to(g.dtype), g).transpose(1, 2)  # (N, C', HW)
        return x + self.out(y.reshape(x.shape[0], -1, x.shape[2], x.shape[3]))


@BLOCKS.register("norm")
class Norm(nn.Module):
    """A norm alone, with activation.

    Args:
        order: one of `ORDERS`.

    Raises:
        ValueError: if the channels change, or `order`, `norm` or `activation` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str = "",
        activation: str = "",
        order: str = "conv-norm-act",
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"norm cannot turn {in_channels} channels into {out_channels}")
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is unknown; choose from {', '.join(ORDERS)}")
        first = order == _PRE
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        self.norm = norm_layer(norm, in_channels) or nn.Identity()
        self.activation = ACTIVATIONS.get("" if first else activation, "activation")()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.pre_activation(x)))


@BLOCKS.register("identity")
class Identity(nn.Module):
    """The map as it is.

    Raises:
        ValueError: if the channels change.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"identity cannot turn {in_channels} channels into {out_channels}")

    def forward(self, x: Tensor) -> Tensor:
        return x
