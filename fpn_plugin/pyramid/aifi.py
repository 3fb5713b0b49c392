"""Attention between all positions of one map, as in RT-DETR. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS
from fpn_plugin.pyramid.resample import _is_exporting


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """`[sin(y·ω), cos(y·ω), sin(x·ω), cos(x·ω)]` of each pixel, row by row, shape `(H·W, C)`, with
    `ωᵢ = 10000^(−i / (C/4))`.

    Computed in float64, or in float32 where a device or the reader of an exported file may lack it,
    then cast.

    Args:
        channels: a multiple of 4.
        like: has the result's type and device.
    """
    lacks = like.dtype != torch.float64 and (like.device.type == "mps" or _is_exporting())
    dtype = torch.float32 if lacks else torch.float64
    count = channels // 4
    steps = torch.arange(count, dtype=dtype, device=like.device) / count
    omega = torch.pow(10000.0, -steps)
    y = torch.arange(height, dtype=dtype, device=like.device).unsqueeze(1) * omega  # (H, C/4)
    x = torch.arange(width, dtype=dtype, device=like.device).unsqueeze(1) * omega  # (W, C/4)
    rows = torch.cat([y.sin(), y.cos()], dim=1).unsqueeze(1).expand(height, width, -1)
    columns = torch.cat([x.sin(), x.cos()], dim=1).unsqueeze(0).expand(height, width, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(like.dtype)


@BLOCKS.register("aifi")
class AIFI(nn.Module):
    """A transformer layer on the pixels of one map: `t = LN(t + MHA(t + pe, t + pe, t))`,
    `t = LN(t + W₂ act(W₁ t))` (RT-DETR's attention-based intra-scale interaction,
    arXiv:2304.08069).

    The place of a pixel enters by sines and cosines, see :func:`sine_positions`. The authors' code
    swaps height and width there, which is right for squares alone; this is the corrected form, as
    in transformers. Memory and time grow with the square of H·W, so it belongs on the coarsest
    level.

    Args:
        heads: of the attention.
        hidden_channels: between the two linear layers. 0 for four times the channels: 1024 of 256.
        inner_activation: between them.

    Raises:
        ValueError: if the channels change, or are not a multiple of 4 and of `heads`, or
            `hidden_channels` is negative.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 8,
        hidden_channels: int = 0,
        inner_activation: str = "gelu",
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"aifi cannot turn {in_channels} channels into {out_channels}")
        if heads < 1 or in_channels % heads:
            raise ValueError(
                f"heads: {heads} heads do not divide {in_channels} channels; take a multiple of"
                f" {max(heads, 1)}"
            )
        if in_channels % 4:
            raise ValueError(
                f"aifi needs channels in four equal parts, for its positions: {in_channels} is not"
                " a multiple of 4"
            )
        if hidden_channels < 0:
            raise ValueError(f"hidden_channels: {hidden_channels}; give 0 or more")
        hidden = hidden_channels or 4 * in_channels
        self.heads = heads
        self.query_key = nn.Linear(in_channels, 2 * in_channels)
        self.value = nn.Linear(in_channels, in_channels)
        self.out = nn.Linear(in_channels, in_channels)
        self.norm1 = nn.LayerNorm(in_channels)
        self.linear1 = nn.Linear(in_channels, hidden)
        self.activation = ACTIVATIONS.get(inner_activation, "inner_activation")()
        self.linear2 = nn.Linear(hidden, in_channels)
        self.norm2 = nn.LayerNorm(in_channels)
        for linear in (self.query_key, self.value, self.out, self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (N, HW, C)
        placed = tokens + sine_positions(h, w, c, tokens)
        query, key = self.query_key(placed).chunk(2, dim=2)
        seen = F.scaled_dot_product_attention(
            self._heads(query), self._heads(key), self._heads(self.value(tokens))
        )  # (N, heads, HW, C / heads)
        tokens = self.norm1(tokens + self.out(seen.transpose(1, 2).flatten(2)))
        tokens = self.norm2(tokens + self.linear2(self.activation(self.linear1(tokens))))
        y = tokens.transpose(1, 2).reshape(n, c, h, w).to(x.dtype)
        return y.contiguous() if x.is_contiguous() else y

    def _heads(self, x: Tensor) -> Tensor:
        """`(N, HW, C)` -> `(N, heads, HW, C / heads)`."""
        n, count, c = x.shape
        return x.reshape(n, count, self.heads, c // self.heads).transpose(1, 2)
