"""FUSIONS: maps of one shape in, one map of that shape out.

Here are those that treat every image alike; `attention_fusion`, which is registered with them, has
those whose weights depend on the maps. `fusion_base` says how a fusion is built and called.
"""

from __future__ import annotations

from typing import List, Sequence

import torch
from torch import Tensor, nn

from fpn_plugin.pyramid import attention_fusion  # noqa: F401  (registers its fusions)
from fpn_plugin.pyramid.blocks import conv_block
from fpn_plugin.pyramid.fusion_base import (
    FUSIONS,
    Fusion,
    Size,
    add_maps,
    repeat_coarse,
    weigh_maps,
)
from fpn_plugin.pyramid.one_pass import sum_in_one_pass

__all__ = ["FUSIONS", "Fusion"]


@FUSIONS.register("sum")
class Sum(Fusion):
    """`Σ xᵢ` (FPN, arXiv:1612.03144)."""

    takes_coarse = True

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        return add_maps(maps, self.coarse, size, self.triton)


@FUSIONS.register("avg")
class Average(Fusion):
    """`Σ xᵢ / n` (Detectron2's other `FUSE_TYPE`)."""

    takes_coarse = True

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        return add_maps(maps, self.coarse, size, self.triton).div_(len(maps))


@FUSIONS.register("max")
class Maximum(Fusion):
    """The elementwise maximum."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        largest = maps[0]
        for x in maps[1:]:
            largest = torch.maximum(largest, x)
        return largest


@FUSIONS.register("product")
class Product(Fusion):
    """`Π xᵢ`, elementwise."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        product = maps[0]
        for x in maps[1:]:
            product = product * x
        return product


@FUSIONS.register("concat")
class Concat(Fusion):
    """`1×1(concat(xᵢ))`, back to `C` channels (YOLO, U-Net).

    Args:
        widths: the channels of each map, which may differ; all `channels` if empty.
    """

    def __init__(
        self, channels: int, count: int, norm: str = "", widths: Sequence[int] = ()
    ) -> None:
        super().__init__(channels, count)
        self.conv = conv_block(sum(widths) or channels * count, channels, 1, norm=norm)

    def forward(self, maps: List[Tensor]) -> Tensor:
        return self.conv(torch.cat(maps, dim=1))  # (N, Σ widths, H, W) -> (N, C, H, W)


@FUSIONS.register("weighted")
class Weighted(Fusion):
    """`Σ wᵢ xᵢ`, w learned from 1, unbounded (EfficientDet, arXiv:1911.09070, equation 1).

    Attributes:
        per_channel: whether a map has one weight per channel, instead of one.
    """

    takes_coarse = True
    per_channel = False

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__(channels, count)
        shape = (count, channels) if self.per_channel else (count,)
        self.weights = nn.Parameter(torch.ones(shape))

    def normalized_weights(self) -> Tensor:
        """The weights that the maps are multiplied by, shape `(n,)`, or `(n, C)` per channel."""
        return self.weights

    def forward(self, maps: List[Tensor], size: Size = None) -> Tensor:
        weights = self.normalized_weights()
        if not torch.jit.is_scripting():
            if weights.dim() == 1:
                total = sum_in_one_pass(maps, self.coarse, size, weights, self.triton)
                if total is not None:
                    return total
        maps = repeat_coarse(maps, self.coarse, size)
        if weights.dim() == 2:
            weights = weights.type_as(maps[0])[:, :, None, None]  # (n, C) -> (n, C, 1, 1)
        return weigh_maps(maps, list(weights.unbind(0)))


@FUSIONS.register("softmax")
class Softmax(Weighted):
    """`Σ softmax(w)ᵢ xᵢ` (EfficientDet, arXiv:1911.09070, equation 2)."""

    def normalized_weights(self) -> Tensor:
        return torch.softmax(self.weights, dim=0)


@FUSIONS.register("fast_normalized")
class FastNormalized(Weighted):
    """`Σ relu(wᵢ) xᵢ / (Σ relu(wⱼ) + eps)`, w from 1 (EfficientDet, arXiv:1911.09070, equation
    3)."""

    def __init__(self, channels: int, count: int, norm: str = "", eps: float = 1e-4) -> None:
        super().__init__(channels, count)
        if type(eps) not in (int, float) or not 0 <= eps <= 1:
            raise ValueError(f"eps {eps!r} is not a number from 0 to 1")
        self.eps = eps

    def normalized_weights(self) -> Tensor:
        positive = torch.relu(self.weights)
        return positive / (positive.sum(dim=0) + self.eps)


@FUSIONS.register("channel_softmax")
class ChannelSoftmax(Softmax):
    """`softmax` with a weight per input and channel (google/automl's `channel_attn`)."""

    per_channel = True


@FUSIONS.register("channel_fast")
class ChannelFast(FastNormalized):
    """`fast_normalized` with a weight per input and channel (automl's `channel_fastattn`)."""

    per_channel = True


@FUSIONS.register("blend")
class Blend(Fusion):
    """`old + w · (new - old)`, w learned from 0, unbounded, a weight per channel.

    The node's first input is "old", its second is "new". At first it passes the old map on bit for
    bit: a warm start (MODEL.FPN.WARM_START) lets a new path in through it.

    Args:
        scale: what the parameter is multiplied by to give w: an optimizer whose steps are as long
            as its learning rate, whatever the gradient, moves w that much faster.
    """

    arity = 2

    def __init__(self, channels: int, count: int, norm: str = "", scale: float = 10.0) -> None:
        super().__init__(channels, count)
        self.scale = scale
        self.weights = nn.Parameter(torch.zeros(channels))

    def normalized_weights(self) -> Tensor:
        """What the maps are multiplied by, shape `(2, C)`."""
        share = self.scale * self.weights
        return torch.stack([1 - share, share])

    def forward(self, maps: List[Tensor]) -> Tensor:
        old, new = maps
        share = (self.scale * self.weights).type_as(old)[:, None, None]  # (C, 1, 1)
        return old + share * (new - old)
