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

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, ORDERS, conv_block


@BLOCKS.register("rep")
class Rep(nn.Module):
    """`3×3(x) + 1×1(x)`, a norm in each (RepVGG, arXiv:2101.03697, without its identity branch, as
    in RT-DETR, arXiv:2304.08069). Inference runs it as one 3×3.

    Args:
        order: one of `ORDERS`; the activation follows the sum, or precedes both convolutions.

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
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is unknown; choose from {', '.join(ORDERS)}")
        first = order == ORDERS[1]
        self.pre_activation = ACTIVATIONS.get(activation if first else "", "activation")()
        self.conv3: Any = conv_block(in_channels, out_channels, 3, stride, norm)
        self.conv1: Any = conv_block(in_channels, out_channels, 1, stride, norm)
        self.activation = ACTIVATIONS.get("" if first else activation, "activation")()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_activation(x)
        y = self.conv3(x)
        if self.conv1 is not None:  # not merged
            y = y + self.conv1(x)
        return self.activation(y)

    def merge_branches(self) -> None:
        """Run as one 3×3 from now on, with the same results, unless a norm is left."""
        if self.conv1 is not None and is_linear(self.conv3) and is_linear(self.conv1):
            add_to(self.conv3, self.conv1)
            self.conv1 = None


def is_linear(conv: Conv2d) -> bool:
    """Whether it is a convolution alone: norm and activation are none, or folded away."""
    return all(part is None or type(part) is nn.Identity for part in (conv.norm, conv.activation))


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
