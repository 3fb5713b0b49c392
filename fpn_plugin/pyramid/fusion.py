"""FUSIONS: maps of one shape in, one map of that shape out.

A fusion is built as `Fusion(channels, count, norm=..., **arguments)` for `count` maps, and called
with a list of maps `(N, C, H, W)`, the node's own level first.
"""

from __future__ import annotations

from typing import Callable, List

import torch
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import conv_block
from fpn_plugin.registry import Registry

FUSIONS: Registry[Callable[..., nn.Module]] = Registry("fusion")


class Fusion(nn.Module):
    """What all fusions share: they are told the channels and how many maps there will be."""

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__()
        self.count = count


@FUSIONS.register("sum")
class Sum(Fusion):
    """`Σ xᵢ` (FPN, arXiv:1612.03144)."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        total = maps[0]
        for x in maps[1:]:
            total = total + x
        return total


@FUSIONS.register("avg")
class Average(Fusion):
    """`Σ xᵢ / n` (Detectron2's other `FUSE_TYPE`)."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        total = maps[0]
        for x in maps[1:]:
            total = total + x
        return total / len(maps)


@FUSIONS.register("max")
class Maximum(Fusion):
    """The elementwise maximum."""

    def forward(self, maps: List[Tensor]) -> Tensor:
        largest = maps[0]
        for x in maps[1:]:
            largest = torch.maximum(largest, x)
        return largest


@FUSIONS.register("concat")
class Concat(Fusion):
    """`1×1(concat(xᵢ))`, back to `C` channels (YOLO, U-Net)."""

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__(channels, count)
        self.conv = conv_block(channels * count, channels, 1, norm=norm)

    def forward(self, maps: List[Tensor]) -> Tensor:
        return self.conv(torch.cat(maps, dim=1))  # (N, n·C, H, W) -> (N, C, H, W)


class _Weighted(Fusion):
    """A sum with one learned weight per map, starting equal."""

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__(channels, count)
        self.weights = nn.Parameter(torch.ones(count))

    def normalized_weights(self) -> Tensor:
        """The weights that the maps are multiplied by, shape `(n,)`."""
        return self.weights

    def forward(self, maps: List[Tensor]) -> Tensor:
        weights = self.normalized_weights()
        # weights[i] has no dimensions, so a half-precision map stays in half precision
        total = maps[0] * weights[0]
        for i in range(1, len(maps)):
            total = total + maps[i] * weights[i]
        return total


@FUSIONS.register("fast_normalized")
class FastNormalized(_Weighted):
    """`Σ relu(wᵢ) xᵢ / (Σ relu(wⱼ) + eps)`, w from 1 (EfficientDet, arXiv:1911.09070, equation
    3)."""

    def __init__(self, channels: int, count: int, norm: str = "", eps: float = 1e-4) -> None:
        super().__init__(channels, count)
        self.eps = eps

    def normalized_weights(self) -> Tensor:
        positive = torch.relu(self.weights)
        return positive / (positive.sum() + self.eps)


@FUSIONS.register("softmax")
class Softmax(_Weighted):
    """`Σ softmax(w)ᵢ xᵢ` (EfficientDet, arXiv:1911.09070, equation 2)."""

    def normalized_weights(self) -> Tensor:
        return torch.softmax(self.weights, dim=0)
