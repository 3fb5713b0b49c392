"""Blocks of parallel convolutions, which inference runs as one. Shapes are `(N, C, H, W)`.

A block with a method `merge_branches` is asked for that form by `TEST.FOLD_NORMS`, once the norms
inside it are folded. Where one is left, it changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, ORDERS, conv_block
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
def _as_conv(norm: nn.Module, like: Conv2d) -> Conv2d:
    """The 1×1 that does what a norm with fixed statistics, or `nn.Identity`, does."""
    conv = Conv2d(like.in_channels, like.in_channels, 1, bias=False).to(like.weight)
    nn.init.dirac_(conv.weight)
    if not isinstance(norm, nn.Identity):
        conv.weight, conv.bias = fuse_conv_bn_weights(
            *(conv.weight, conv.bias, norm.running_mean, norm.running_var),
            *(norm.eps, norm.weight, norm.bias),
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
