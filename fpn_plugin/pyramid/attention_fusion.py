"""Fusions whose weights are computed from the maps. Shapes are `(N, C, H, W)`; `n` is the number of
maps."""

from __future__ import annotations

import math
from typing import List, Sequence

import torch
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import conv_block, norm_layer
from fpn_plugin.pyramid.fusion_base import FUSIONS, Fusion, add_maps, weigh_maps


@FUSIONS.register("global_attention")
class GlobalAttention(Fusion):
    """`coarse + fine · σ(global max pool(coarse))` (NAS-FPN, arXiv:1904.07392, as its TensorFlow
    release has it).

    Of the two maps, "coarse" is the one from the higher level; if both come from one level, the
    second.

    Args:
        levels: the level that each map comes from.
    """

    arity = 2
    input_dependent = True

    def __init__(
        self, channels: int, count: int, norm: str = "", levels: Sequence[int] = ()
    ) -> None:
        super().__init__(channels, count)
        self.first_is_coarse = len(levels) == 2 and levels[0] > levels[1]

    def forward(self, maps: List[Tensor]) -> Tensor:
        first, second = maps
        if self.first_is_coarse:
            coarse, fine = first, second
        else:
            coarse, fine = second, first
        return coarse + fine * torch.sigmoid(coarse.amax(dim=[2, 3], keepdim=True))  # (N, C, 1, 1)


@FUSIONS.register("asff")
class AdaptiveSpatial(Fusion):
    """`Σ αᵢ xᵢ` with, at each pixel, `α = softmax over inputs of 1×1(concat(1×1→hidden of each))`
    (ASFF, arXiv:1911.09516).

    The norm follows the convolutions to `hidden` channels; the one that gives the logits has none.

    Args:
        hidden: the channels that each map is compressed to.
    """

    input_dependent = True

    def __init__(self, channels: int, count: int, norm: str = "", hidden: int = 16) -> None:
        super().__init__(channels, count)
        _check_positive("hidden", hidden)
        self.compress = nn.ModuleList(_compression(channels, hidden, norm) for _ in range(count))
        self.logits = conv_block(hidden * count, count, 1)

    def forward(self, maps: List[Tensor]) -> Tensor:
        compressed: List[Tensor] = []
        for i, conv in enumerate(self.compress):
            compressed.append(conv(maps[i]))
        logits = self.logits(torch.cat(compressed, dim=1))  # (N, n·hidden, H, W) -> (N, n, H, W)
        # autocast computes a softmax in float32
        weights = torch.softmax(logits, dim=1).type_as(maps[0])
        return weigh_maps(maps, list(weights.split(1, dim=1)))


def _compression(channels: int, hidden: int, norm: str) -> Conv2d:
    """A 1x1 convolution with norm.

    GN gets groups of 8 channels, as its 32 groups make of a pyramid's 256: so few channels have no
    32 groups.
    """
    layer: nn.Module | None
    if norm == "GN":
        layer = nn.GroupNorm(hidden // math.gcd(hidden, 8), hidden)
    else:
        layer = norm_layer(norm, hidden)
    conv = Conv2d(channels, hidden, 1, bias=layer is None, norm=layer)
    weight_init.c2_xavier_fill(conv)
    return conv


@FUSIONS.register("gate")
class Gate(Fusion):
    """`σ(1×1(new)) · new + (1 − σ(1×1(new))) · old` (DetectoRS, arXiv:2006.02334).

    The node's first input is "new", its second is "old". The convolution has one output channel and
    no norm, and starts from zero, as in the authors' code: at first both maps count alike.
    """

    arity = 2
    input_dependent = True

    def __init__(self, channels: int, count: int, norm: str = "") -> None:
        super().__init__(channels, count)
        self.conv = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: List[Tensor]) -> Tensor:
        new, old = maps
        gate = torch.sigmoid(self.conv(new)).type_as(new)  # (N, C, H, W) -> (N, 1, H, W)
        return gate * new + (1 - gate) * old


@FUSIONS.register("attention")
class SelectiveKernel(Fusion):
    """`Σ aᵢ xᵢ` with `a = softmax over inputs of FCᵢ(ReLU(FC(GAP(Σ xⱼ))))`, a weight per image,
    input and channel (SKNet, arXiv:1903.06586).

    There is no norm between the two layers: an image gives them a single value per channel.

    Args:
        reduction: the first layer gives `max(C // reduction, 32)` values.
    """

    input_dependent = True

    def __init__(self, channels: int, count: int, norm: str = "", reduction: int = 16) -> None:
        super().__init__(channels, count)
        _check_positive("reduction", reduction)
        hidden = max(channels // reduction, 32)
        self.reduce = nn.Linear(channels, hidden)
        self.logits = nn.ModuleList(nn.Linear(hidden, channels) for _ in range(count))
        for layer in (self.reduce, *self.logits):
            weight_init.c2_xavier_fill(layer)

    def forward(self, maps: List[Tensor]) -> Tensor:
        pooled = add_maps(maps, self.coarse, None).mean(dim=[2, 3])  # (N, C, H, W) -> (N, C)
        hidden = torch.relu(self.reduce(pooled))
        logits: List[Tensor] = []
        for layer in self.logits:
            logits.append(layer(hidden))
        weights = torch.softmax(torch.stack(logits, dim=1), dim=1)  # (N, n, C)
        # autocast computes a softmax in float32
        weights = weights.type_as(maps[0])[:, :, :, None, None]
        return weigh_maps(maps, list(weights.unbind(1)))


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r} is not a positive whole number")
