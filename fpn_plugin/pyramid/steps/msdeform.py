"""Multi-scale deformable attention: a transformer's encoder over the pixels of all levels.

Shapes: N images, S pixels of all levels together, C channels, M heads, K points per level.
"""

from __future__ import annotations

import math
from typing import List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, at_least_float32
from fpn_plugin.pyramid.steps.base import STEPS
from fpn_plugin.registry import bad_argument


@STEPS.register("msdeform")
class DeformableEncoder(nn.Module):
    """The encoder of Deformable DETR (Zhu et al. 2020, arXiv:2010.04159) as in Mask2Former's pixel
    decoder (Cheng et al. 2021, arXiv:2112.01527).

    Every pixel of every level looks at a few points around its place in each level. Where they are,
    and how much each counts, is computed from the pixel and its position embedding::

        t = LN(t + attention(t + position, t))
        t = LN(t + W₂ ReLU(W₁ t))

    The whole map counts, its padding too, as in Mask2Former: a pyramid does not know what of a
    batch is padding. There is no dropout.

    Args:
        channels: of the maps.
        levels: of the maps.
        layers: how often it looks.
        heads: among which the channels are divided, each with points of its own.
        points: per head and level.
        hidden_channels: between the two linear layers.
        inner_activation: between them.

    Raises:
        ValueError: naming the argument, if a number is not positive, the heads do not divide the
            channels, or these are no multiple of 4, as the position embedding needs.
    """

    def __init__(
        self,
        channels: int,
        levels: Sequence[int],
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        hidden_channels: int = 1024,
        inner_activation: str = "relu",
    ) -> None:
        super().__init__()
        counts = {"layers": layers, "heads": heads, "points": points}
        for name, count in {**counts, "hidden_channels": hidden_channels}.items():
            if type(count) is not int or count < 1:
                raise bad_argument(name, f"{count!r} is not a whole number from 1")
        if channels % heads:
            raise bad_argument(
                "heads", f"{heads} heads do not divide {channels} channels (`out_channels`)"
            )
        if channels % 4:
            raise bad_argument(
                "out_channels", f"msdeform needs a multiple of 4 channels, not {channels}"
            )
        self.level_embedding = nn.Parameter(torch.randn(len(levels), channels))
        self.layers = nn.ModuleList(
            _Layer(channels, len(levels), heads, points, hidden_channels, inner_activation)
            for _ in range(layers)
        )

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        positions: List[Tensor] = []
        centres: List[Tensor] = []
        for i, x in enumerate(maps):
            positions.append(sine_position(x) + at_least_float32(self.level_embedding[i]))
            centres.append(_pixel_centres(x))
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (N, S, C)
        position = torch.cat(positions).to(self.level_embedding.dtype)  # (S, C)
        centre = torch.cat(centres)  # (S, 2)
        for layer in self.layers:
            tokens = layer(tokens, position, centre, maps)
        outputs: List[Tensor] = []
        start = 0
        for x in maps:
            end = start + x.shape[2] * x.shape[3]
            outputs.append(tokens[:, start:end].transpose(1, 2).reshape(x.shape).to(x.dtype))
            start = end
        return outputs


class _Layer(nn.Module):
    """Attention and two linear layers, each with a shortcut and a norm after it."""

    def __init__(
        self, channels: int, levels: int, heads: int, points: int, hidden: int, activation: str
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = _linear(channels, hidden)
        self.activation = ACTIVATIONS.get(activation, "inner_activation")()
        self.linear2 = _linear(hidden, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(
        self, tokens: Tensor, position: Tensor, centre: Tensor, maps: List[Tensor]
    ) -> Tensor:
        tokens = self.norm1(tokens + self.attention(tokens + position, tokens, centre, maps))
        return self.norm2(tokens + self.linear2(self.activation(self.linear1(tokens))))


class DeformableAttention(nn.Module):
    """Every pixel's weighted mean of points in all levels.

    Point `k` of head `m` in level `i` is `offset` pixels of that level away from the pixel's own
    centre. Between pixels it is interpolated bilinearly, and zero outside the map. The weights are
    a softmax over the points of all levels. At the start, the points of a head lie on a ray at 1,
    2, ... pixels, and weigh the same.
    """

    def __init__(self, channels: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.logits = nn.Linear(channels, heads * levels * points)
        self.value = _linear(channels, channels)
        self.out = _linear(channels, channels)
        for layer in (self.offsets, self.logits):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.logits.bias)
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rays = rays / rays.abs().max(dim=-1, keepdim=True).values  # onto a square's edge, (M, 2)
        steps = torch.arange(1.0, points + 1)[None, None, :, None]
        with torch.no_grad():
            self.offsets.bias.copy_((rays[:, None, None] * steps).repeat(1, levels, 1, 1).flatten())

    def forward(
        self, queries: Tensor, tokens: Tensor, centre: Tensor, maps: List[Tensor]
    ) -> Tensor:
        """Look at the points of all levels.

        Args:
            queries: what points and weights are computed from, `(N, S, C)`.
            tokens: what is looked at, of all levels together.
            centre: of each pixel, (x, y) from -1 to 1, `(S, 2)`.
            maps: of all levels, for their sizes.
        """
        n, count, channels = tokens.shape
        shape = [n, count, self.heads, self.levels, self.points]
        offsets = at_least_float32(self.offsets(queries)).reshape(shape + [2])
        logits = at_least_float32(self.logits(queries)).reshape(
            n, count, self.heads, self.levels * self.points
        )
        weights = logits.softmax(-1).reshape(shape)
        values = at_least_float32(self.value(tokens))  # sampled in float32 at least
        # (N·M, C/M, S), of one level after the other: no more than K maps of all values at once
        per_head = [n * self.heads, channels // self.heads, count]
        # zeros of this shape: a reshape would bind an exported program to sizes of some divisor
        total = torch.zeros(per_head, dtype=values.dtype, device=values.device)
        start = 0
        for i, x in enumerate(maps):
            height, width = x.shape[2], x.shape[3]
            end = start + height * width
            value = values[:, start:end].transpose(1, 2)  # (N, C, H·W)
            value = value.reshape(n * self.heads, channels // self.heads, height, width)
            start = end
            offset = offsets[:, :, :, i].transpose(1, 2)  # (N, M, S, K, 2)
            # grid_sample's coordinates go from -1 to 1 over the map
            grid = torch.stack([offset[..., 0] * (2 / width), offset[..., 1] * (2 / height)], -1)
            grid = (grid + centre[:, None]).flatten(0, 1)  # (N·M, S, K, 2)
            sampled = F.grid_sample(value, grid, padding_mode="zeros", align_corners=False)
            weight = weights[:, :, :, i].transpose(1, 2).flatten(0, 1)  # (N·M, S, K)
            total = total + (sampled * weight[:, None]).sum(-1)
        return self.out(total.reshape(n, channels, count).transpose(1, 2).to(tokens.dtype))


def sine_position(x: Tensor) -> Tensor:
    """A map's position embedding, `(H·W, C)`, in float32 at least.

    The first half of the channels tells the row, the second the column: sines and cosines in turns,
    of wavelengths from once the map's side upwards (DETR, arXiv:2005.12872)::

        angle = 2π (i + 1) / (n + 1e-6) / 10000^(2⌊j/2⌋ / (C/2))
    """
    height, width, half = x.shape[2], x.shape[3], x.shape[1] // 2
    rows = _sine(height, half, x)[:, None].expand(height, width, half)
    columns = _sine(width, half, x)[None].expand(height, width, half)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _sine(count: int, channels: int, x: Tensor) -> Tensor:
    """The embedding of places along one side, `(count, channels)`."""
    places = torch.arange(1, count + 1, device=x.device).to(_dtype(x))
    places = places / (places[-1:] + 1e-6) * (2 * math.pi)
    exponents = torch.arange(0, channels, 2, device=x.device).to(_dtype(x)) / channels
    angles = places[:, None] / 10000.0**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _pixel_centres(x: Tensor) -> Tensor:
    """The (x, y) of a map's pixels, from -1 to 1 over the map, `(H·W, 2)`, in float32 at least."""
    height, width = x.shape[2], x.shape[3]
    dtype = _dtype(x)
    rows = (torch.arange(height, device=x.device).to(dtype) * 2 + 1) / height - 1
    columns = (torch.arange(width, device=x.device).to(dtype) * 2 + 1) / width - 1
    pair = [columns[None].expand(height, width), rows[:, None].expand(height, width)]
    return torch.stack(pair, dim=-1).flatten(0, 1)


def _dtype(x: Tensor) -> torch.dtype:
    """The map's, or float32 for one in half precision."""
    return at_least_float32(x[:1, :1, :1, :1]).dtype


def _linear(in_channels: int, out_channels: int) -> nn.Linear:
    layer = nn.Linear(in_channels, out_channels)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
