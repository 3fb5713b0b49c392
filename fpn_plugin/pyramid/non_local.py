"""The non-local block, registered as `non_local` in BLOCKS. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import BLOCKS, conv_block


@BLOCKS.register("non_local")
class NonLocal(nn.Module):
    """`x + W(softmax(θ(x)ᵀ φ(x)) g(x))`: each place sees all others (Wang et al. 2018,
    arXiv:1711.07971).

    The embedded-Gaussian form, with W starting at zero, so that the block starts as the identity.
    Its cost grows with the square of the number of places, so it belongs on a coarse level.

    Args:
        reduction: of the channels inside.

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
            weight_init.c2_xavier_fill(conv)
        self.out = conv_block(inner, in_channels, 1, norm=norm)
        last = self.out.weight if self.out.norm is None else getattr(self.out.norm, "weight", None)
        nn.init.zeros_(self.out.weight if last is None else last)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x).flatten(2).transpose(1, 2)  # (N, HW, C')
        phi = self.phi(x).flatten(2)  # (N, C', HW)
        g = self.g(x).flatten(2).transpose(1, 2)  # (N, HW, C')
        attention = torch.softmax(torch.bmm(theta, phi), dim=-1)  # (N, HW, HW)
        y = torch.bmm(attention.to(g.dtype), g).transpose(1, 2)  # (N, C', HW)
        return x + self.out(y.reshape(x.shape[0], -1, x.shape[2], x.shape[3]))
