"""BLOCKS: the convolutions of laterals, projections and nodes. Shapes are `(N, C, H, W)`.

A block is built as `Block(in_channels, out_channels, norm=..., activation=..., **arguments)`. Those
of several convolutions are in `blocks_compound.py`, the deformable one in `deformable.py`.
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.layers.batch_norm import LayerNorm
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fpn_plugin.registry import Registry, bad_argument

BLOCKS: Registry[Callable[..., nn.Module]] = Registry("block")
ACTIVATIONS: Registry[Callable[[], nn.Module]] = Registry("activation")
ORDERS = ("conv-norm-act", "act-conv-norm")
_NORMS = (_NormBase, FrozenBatchNorm2d, nn.GroupNorm, nn.LayerNorm, LayerNorm)

for _name, _activation in {
    "": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,  # the name in EfficientDet's paper
}.items():
    ACTIVATIONS.register(_name)(_activation)


def norm_layer(norm: str, channels: int) -> nn.Module | None:
    """Detectron2's normalisation layer of that name over `channels`; None for "".

    Raises:
        ValueError: naming `norm`, if the name is unknown or does not divide the channels.
    """
    try:
        return get_norm(norm, channels)
    except KeyError:
        raise bad_argument(
            "norm", f"unknown norm {norm!r}; choose from BN, SyncBN, FrozenBN, GN, LN"
        ) from None
    except ValueError as error:  # torch's GroupNorm: channels must be divisible by groups
        raise bad_argument(
            "norm",
            f"{norm!r} cannot normalise {channels} channels (`out_channels`): {error};"
            " GN has 32 groups, so take a multiple of 32",
        ) from None


def set_norm(module: nn.Module, eps: float, momentum: float) -> nn.Module:
    """Give every normalisation layer inside a module this eps and momentum; 0 leaves its own.

    Momentum concerns the layers that keep running statistics alone.
    """
    for layer in module.modules():
        if isinstance(layer, _NORMS):
            if eps:
                layer.eps = eps
            if momentum and isinstance(layer, _NormBase):
                layer.momentum = momentum
    return module


def at_least_float32(x: Tensor) -> Tensor:
    """A half-precision map as float32, for operators that have no half precision or lose by it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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
) -> Conv2d:
    """A convolution that keeps the size (or divides it by `stride`, rounding up), with norm and
    activation.

    It has Detectron2's initialisation (`c2_xavier_fill`) and parameter names: `weight`, `bias`,
    `norm.*`.

    Args:
        order: one of `ORDERS`.
        bias: None for a bias exactly if there is no norm.

    Raises:
        ValueError: if `order`, `norm` or `activation` is unknown.
    """
    act = ACTIVATIONS.get(activation, "activation")()
    keywords = {
        "stride": stride,
        "padding": kernel // 2,
        "bias": norm == "" if bias is None else bias,
        "norm": norm_layer(norm, out_channels),
    }
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is unknown; choose from {', '.join(ORDERS)}")
    if order == "conv-norm-act":
        conv = Conv2d(
            in_channels, out_channels, kernel, activation=act if activation else None, **keywords
        )
    else:
        conv = _PreActivationConv(in_channels, out_channels, kernel, pre_activation=act, **keywords)
    weight_init.c2_xavier_fill(conv)
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
        first = order == "act-conv-norm"
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        self.depthwise = Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        weight_init.c2_xavier_fill(self.depthwise)
        rest = ("", "conv-norm-act") if first else (activation, order)
        self.pointwise = conv_block(in_channels, out_channels, 1, 1, norm, *rest, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(self.pre_activation(x)))


@BLOCKS.register("identity")
class Identity(nn.Module):
    """Nothing.

    Raises:
        ValueError: if the channels change.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"identity cannot turn {in_channels} channels into {out_channels}")

    def forward(self, x: Tensor) -> Tensor:
        return x


# they enter their blocks in BLOCKS; last, because they need what is above
from fpn_plugin.pyramid import blocks_compound, deformable, non_local  # noqa: E402,F401
